"""`--track`: each step's metrics also go to TensorBoard, Weights & Biases or Trackio, which are optional packages.

Without --track nothing is sent anywhere. Files go into the work folder, and only process 0 tracks. Each stage has its own
curves, named after it, over its own steps. A resumed run continues them without duplicate steps.
"""

from collections.abc import Callable
from collections.abc import Generator
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from typing import Protocol
import uuid

import numpy as np

from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.log import RunLog
from elder_jax.log import log
from elder_jax.log import write_json

STATE = 'tracking.json'
PROJECT = 'elder_jax'


class Writer(Protocol):
  """A tracker. Its methods may raise any exception; see Trackers."""

  def begin(self, stage: str, step: int):
    """A stage starts at `step`. If the run resumes, steps from there on may be written a second time."""

  def write(self, stage: str, step: int, scalars: dict[str, float]):
    """Sends a step. scalars: finite."""

  def close(self, failed: bool):
    """The run ended. failed: with an exception."""


class State:
  """workdir/tracking.json: the id of the run, and the last step of each stage that was sent to each tracker.

  workdir.record removes the file when training restarts with other settings, because its steps differ from those sent.
  """

  def __init__(self, work: pathlib.Path):
    self._path = work / STATE
    try:
      before = json.loads(self._path.read_text(encoding='utf-8'))
      self._state = {'id': str(before['id']), 'sent': dict(before['sent'])}
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete
      self._state = {'id': uuid.uuid4().hex[:12], 'sent': {}}
    write_json(self._path, self._state)

  @property
  def id(self) -> str:
    return self._state['id']

  def is_new(self, tracker: str, stage: str, step: int) -> bool:
    """Whether a step has not been sent yet. Marks it as sent."""
    sent = self._state['sent'].setdefault(tracker, {})
    if step <= sent.get(stage, -1):
      return False
    sent[stage] = step
    temporary = self._path.with_name(f'{STATE}.partial')
    temporary.write_text(json.dumps(self._state))  # not write_whole, which would wait for the disk in every step
    os.replace(temporary, self._path)
    return True


class TensorBoard:
  """Event files in workdir/tensorboard/STAGE/, written by the parts of tensorboardX that use no thread."""

  def __init__(self, work: pathlib.Path, config: dict, state: State):
    del state
    summary = importlib.import_module('tensorboardX.summary')
    self._protos = {name: importlib.import_module(f'tensorboardX.proto.{name}_pb2') for name in ('event', 'summary')}
    self._open_file = importlib.import_module('tensorboardX.event_file_writer').EventsWriter
    self._folder, self._files = work / 'tensorboard', {}
    for old in self._folder.glob('events.*'):  # settings of an earlier attempt, which TensorBoard would still show
      old.unlink()
    self.begin('', 0)
    rows = '\n'.join(f'| {name} | {json.dumps(value)} |' for name, value in config.items())
    self._add('', 0, summary=summary.text('config', f'| setting | value |\n|---|---|\n{rows}'))

  def begin(self, stage: str, step: int):
    """Makes TensorBoard ignore what an earlier attempt wrote from this step on."""
    folder = self._folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    # tensorboardX names files by whole seconds and overwrites existing ones, so the suffix has nanoseconds.
    self._files[stage] = self._open_file(str(folder / 'events'), f'.{time.time_ns()}')
    session = self._protos['event'].SessionLog
    self._add(stage, step, session_log=session(status=session.START))

  def write(self, stage: str, step: int, scalars: dict[str, float]):
    summary = self._protos['summary'].Summary
    values = [summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    self._add(stage, step, summary=summary(value=values))

  def close(self, failed: bool):
    for file in self._files.values():
      file.close()

  def _add(self, stage: str, step: int, **what):
    self._files[stage].write_event(self._protos['event'].Event(wall_time=time.time(), step=step, **what))
    self._files[stage].flush()


class Wandb:
  """A run of Weights & Biases, with `STAGE/metric` over `STAGE/step`. Its files are in workdir/wandb."""

  def __init__(self, work: pathlib.Path, config: dict, state: State):
    wandb = importlib.import_module('wandb')

    self._state = state
    self._run = wandb.init(
      project=os.environ.get('WANDB_PROJECT', PROJECT),
      dir=work,
      id=state.id,
      name=os.environ.get('WANDB_NAME', work.resolve().name),
      resume='allow',
      config=config,
      settings=wandb.Settings(console='off'),  # wandb does not capture stderr
    )

  def begin(self, stage: str, step: int):
    self._run.define_metric(f'{stage}/*', step_metric=f'{stage}/step')

  def write(self, stage: str, step: int, scalars: dict[str, float]):
    if self._state.is_new('wandb', stage, step):
      self._run.log({f'{stage}/{name}': value for name, value in {'step': step, **scalars}.items()})

  def close(self, failed: bool):
    self._run.finish(exit_code=int(failed))


class Trackio:
  """A run of Trackio, with `STAGE/metric` over the stage's steps. In workdir/trackio unless TRACKIO_DIR is set."""

  def __init__(self, work: pathlib.Path, config: dict, state: State):
    os.environ.setdefault('TRACKIO_DIR', str((work / 'trackio').resolve()))  # read during import
    trackio = importlib.import_module('trackio')

    self._state = state
    name = f'{work.resolve().name}-{state.id}'
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report
      self._run = trackio.init(project=PROJECT, name=name, config=config, resume='allow', embed=False)

  def begin(self, stage: str, step: int):
    """Does nothing: `write` skips steps that were sent before."""

  def write(self, stage: str, step: int, scalars: dict[str, float]):
    if self._state.is_new('trackio', stage, step):
      self._run.log({f'{stage}/{name}': value for name, value in scalars.items()}, step=step)

  def close(self, failed: bool):
    with contextlib.redirect_stdout(sys.stderr):
      self._run.finish()


@dataclasses.dataclass(frozen=True)
class Tracker:
  """An entry of TRACKERS.

  package: the package that it imports.
  extra: the extra of elder_jax that installs this package.
  open: (work folder, all settings, State) -> Writer.
  """

  package: str
  extra: str
  open: Callable[[pathlib.Path, dict, State], Writer]


TRACKERS = {
  'tensorboard': Tracker('tensorboardX', 'tensorboard', TensorBoard),
  'wandb': Tracker('wandb', 'wandb', Wandb),
  'trackio': Tracker('trackio', 'trackio', Trackio),
}


def check(names: tuple[str, ...]):
  """Raises InputError, in all processes, if process 0 lacks the package of a tracker."""

  def find():
    for name in names if hosts.is_leader() else ():
      if importlib.util.find_spec(TRACKERS[name].package) is None:
        extra = TRACKERS[name].extra
        raise InputError('track', name, f"its package is missing; install it with pip install 'elder_jax[{extra}]'.")

  hosts.leader_first(find)


class Trackers:
  """The trackers of a run, as a log.Listener. One that fails is reported and dropped; the run continues."""

  def __init__(self, writers: dict[str, Writer]):
    self._writers = dict(writers)

  def begin(self, stage: str, step: int):
    self._each(lambda writer: writer.begin(stage, step))

  def write(self, stage: str, step: int, metrics: dict):
    scalars = {name: float(v) for name, v in metrics.items() if _is_scalar(v) and math.isfinite(v)}
    self._each(lambda writer: writer.write(stage, step, scalars))

  def close(self, failed: bool):
    self._each(lambda writer: writer.close(failed))

  def _each(self, call: Callable[[Writer], None]):
    for name, writer in list(self._writers.items()):
      try:
        call(writer)
      except Exception as e:  # another package, perhaps over a network, may raise anything  # noqa: BLE001
        del self._writers[name]
        log(f'--track={name} failed ({reason(e)}); dropping it for this run, metrics.jsonl still has every step')


def _is_scalar(value) -> bool:
  return isinstance(value, int | float | np.number | np.ndarray) and np.ndim(value) == 0


@contextlib.contextmanager
def tracked(run_log: RunLog, names: tuple[str, ...], work: pathlib.Path, config: dict) -> Generator[None]:
  """Also sends what run_log records to trackers.

  Args:
    names: of TRACKERS.
    config: all settings, to be shown by the trackers.

  Raises:
    InputError: in all processes, if a tracker cannot be opened. Nothing has been computed at that point.
  """
  trackers = Trackers({})

  def start():
    nonlocal trackers
    if names and hosts.is_leader():
      state = State(work)
      trackers = Trackers({name: _open(name, work, config, state) for name in dict.fromkeys(names)})
      run_log.add_listener(trackers)

  hosts.leader_first(start)
  try:
    yield
  except BaseException:
    trackers.close(failed=True)
    raise
  trackers.close(failed=False)


def _open(name: str, work: pathlib.Path, config: dict, state: State) -> Writer:
  try:
    return TRACKERS[name].open(work, config, state)
  except Exception as e:  # a missing login, an unreachable host, and so on  # noqa: BLE001
    raise InputError('track', name, f'cannot be opened ({reason(e)}); fix this or leave the tracker out.') from e
