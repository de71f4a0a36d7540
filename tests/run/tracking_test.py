"""--track: each step is sent once, also when a run resumes. A failing tracker does not affect the run."""

import json
import pathlib
import struct
import sys
import types

import pytest
from refusal import refused
from tiny import config_of
from tiny import stop_at_batch

from elder_jax.errors import InputError
from elder_jax.log import RunLog
from elder_jax.run import pipeline
from elder_jax.run import tracking
from elder_jax.run import workdir


def events(folder: pathlib.Path) -> list:
  """All events of a TensorBoard folder, in order."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted(folder.glob('events.*')):
    data, start = path.read_bytes(), 0
    while start < len(data):  # a record: length, checksum, event, checksum
      (length,) = struct.unpack('<Q', data[start : start + 8])
      found.append(Event.FromString(data[start + 12 : start + 12 + length]))
      start += 12 + length + 4
  return found


def curves(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """{name: [(step, value)]} as TensorBoard shows it: a session start drops later steps of earlier sessions."""
  shown: dict[str, list[tuple[int, float]]] = {}
  for event in events(folder):
    if event.HasField('session_log'):
      shown = {name: [p for p in points if p[0] < event.step] for name, points in shown.items()}
    for value in event.summary.value:
      shown.setdefault(value.tag, []).append((event.step, value.simple_value))
  return shown


class Recorder:
  """Replaces the packages wandb and trackio, which the tests do not need."""

  def __init__(self):
    self.inits, self.rows, self.finished = [], [], 0

  def init(self, **how):
    self.inits.append(how)
    return self

  def define_metric(self, name, step_metric):
    pass

  def log(self, metrics, step=None):
    self.rows.append(metrics if step is None else metrics | {'step': step})

  def finish(self, **how):
    self.finished += 1

  def Settings(self, **how):
    return how


@pytest.fixture
def packages(monkeypatch) -> dict[str, Recorder]:
  fakes = {name: Recorder() for name in ('wandb', 'trackio')}
  for name, fake in fakes.items():
    monkeypatch.setitem(sys.modules, name, fake)
  monkeypatch.setenv('TRACKIO_DIR', '/nowhere')
  monkeypatch.setattr(tracking, 'check', lambda names: None)
  return fakes


def test_tensorboard_has_every_step_once_when_a_run_resumes(settings, packages, monkeypatch):
  settings |= dict(
    method='last', recipe='prune_then_train', compare=[], train_steps=5, eval_data=(), checkpoint_every=2
  )
  stop_at_batch(monkeypatch, 4, settings | dict(track='tensorboard,wandb'))
  # Remove the newest checkpoint, so that the resumed run repeats the steps after the one before.
  checkpoints = pathlib.Path(settings['workdir']) / 'checkpoints' / 'prune_then_train'
  newest = max(checkpoints.iterdir(), key=lambda path: int(path.name))
  assert newest.name == '3'
  for path in sorted(newest.rglob('*'), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  newest.rmdir()
  pipeline.run(config_of(**settings | dict(track='tensorboard,wandb,trackio')))

  work = pathlib.Path(settings['workdir'])
  rows = [json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()]
  shown = curves(work / 'tensorboard' / 'prune_then_train')
  assert [step for step, _ in shown['loss']] == [0, 1, 2, 3, 4] == [row['step'] for row in rows]
  for (_, loss), row in zip(shown['loss'], rows):
    assert loss == pytest.approx(row['loss'], rel=1e-6)
  assert 'lr' in shown and 'time' not in shown and len(shown['tokens_per_second']) < 5  # null for a step that compiles
  assert any(b'seq_len' in v.tensor.string_val[0] for e in events(work / 'tensorboard') for v in e.summary.value)

  wandb, trackio = packages['wandb'], packages['trackio']
  assert [row['prune_then_train/step'] for row in wandb.rows] == [0, 1, 2, 3, 4]
  assert len({how['id'] for how in wandb.inits}) == 1 and len(wandb.inits) == wandb.finished == 2
  assert wandb.inits[0]['config']['seq_len'] == 32 and wandb.inits[0]['dir'] == work
  assert [row['step'] for row in trackio.rows] == [2, 3, 4]  # added when the run resumed
  assert {'prune_then_train/loss', 'prune_then_train/lr'} <= set(trackio.rows[0])


def test_other_settings_after_a_failure_start_another_run(settings, packages, tmp_path):
  work = tmp_path / 'work'
  work.mkdir()
  before = tracking.State(work)
  assert before.is_new('wandb', 'gates', 3) and not before.is_new('wandb', 'gates', 3)
  assert before.is_new('trackio', 'gates', 0) and tracking.State(work).id == before.id
  assert not tracking.State(work).is_new('wandb', 'gates', 2)
  workdir.record(config_of(**settings), {})
  (work / workdir.FAILED).touch()
  workdir.record(config_of(**settings | dict(eval_tokens=128)), {})
  assert tracking.State(work).id == before.id
  (work / workdir.FAILED).touch()
  workdir.record(config_of(**settings | dict(eval_tokens=128, lr=2e-3)), {})
  after = tracking.State(work)
  assert after.id != before.id and after.is_new('wandb', 'gates', 0)
  (work / tracking.STATE).write_text('{"id"')
  assert tracking.State(work).id not in (before.id, after.id)


def test_a_tracker_that_fails_is_reported_once_and_dropped(packages, tmp_path, capsys, monkeypatch):
  def fails(metrics, step=None):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(packages['wandb'], 'log', fails)
  run_log = RunLog(tmp_path / 'metrics.jsonl')
  with tracking.tracked(run_log, ('wandb', 'trackio'), tmp_path, {}):
    record = run_log.steps('gates')
    for step in range(3):
      record(step, {'loss': float('nan') if step else 1.0, 'lr': 0.5})
  err = capsys.readouterr().err
  assert err.count('--track=wandb failed') == 1 and 'no route to host' in err
  assert packages['trackio'].rows[1] == {'gates/lr': 0.5, 'step': 1} and packages['trackio'].finished == 1
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 3 and not packages['wandb'].finished


def test_an_unknown_failing_or_missing_tracker_is_refused(settings, packages, monkeypatch, no_long_work, no_text):
  with pytest.raises(InputError, match='track=mlflow: is not known; choose from: tensorboard, wandb, trackio'):
    config_of(**settings | dict(track='wandb,mlflow'))

  def fails(**how):
    raise RuntimeError('not logged in')

  monkeypatch.setattr(packages['wandb'], 'init', fails)
  with (
    pytest.raises(InputError, match='track=wandb: cannot be opened .*not logged in'),
    tracking.tracked(types.SimpleNamespace(), ('wandb',), pathlib.Path(settings['model']).parent, {}),
  ):
    pytest.fail('the run continued')
  monkeypatch.undo()
  monkeypatch.setattr(tracking.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"track=trackio: .*pip install 'elder_jax\[trackio\]'"):
    tracking.check(('trackio',))


def test_a_missing_package_is_reported_before_any_work(settings, monkeypatch, no_long_work, no_text):
  monkeypatch.setattr(tracking.importlib.util, 'find_spec', lambda name: None)
  refused(settings, '--track=tensorboard', "pip install 'elder_jax[tensorboard]'", track='tensorboard')
