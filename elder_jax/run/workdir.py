"""The work folder. One run at a time holds it, always with the settings that it started with.

It contains config.json and inputs.json (settings and inputs), stages/ (small results), checkpoints/, metrics.jsonl, files
of trackers, and at the end export/, report.json, report.md and report.html. `failed.txt` contains the error of the last
attempt.
"""

from collections.abc import Generator
import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import traceback

from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.errors import disk_is_full
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.run import tracking
from elder_jax.run.config import Config
from elder_jax.run.config import defaults
from elder_jax.run.config import settings_of_json
from elder_jax.run.removal_settings import CHOOSING
from elder_jax.run.removal_settings import DEFAULT_RATIO
from elder_jax.run.removal_settings import HOW_MUCH
from elder_jax.run.result_settings import EvalSettings
from elder_jax.settings import fields
from elder_jax.settings import name_of
from elder_jax.training.settings import TrainSettings

LOCK, FAILED = '.lock', 'failed.txt'
FILES = (
  *('config.json', 'inputs.json', 'metrics.jsonl', 'report.json', 'report.md', 'report.html', 'sweep.svg', 'curve.svg'),
  *(tracking.STATE, LOCK, FAILED),
)
FOLDERS = ('stages', 'checkpoints', 'export', 'export.partial', 'source', 'tokens', 'runs', *tracking.TRACKERS)
# Files that a refused or killed run may leave in a folder before claiming it.
_EARLY = ('source', LOCK, '.writable', 'config.json.partial', 'inputs.json', 'inputs.json.partial')

# Settings that may change when a run resumes.
FREE_ON_RESUME = frozenset(
  'workdir checkpoint_every checkpoint_minutes keep_checkpoints verify mesh plan force topology track push_to_hub'.split()
)
# After a failure any setting may change. These groups decide which results are kept; any other change drops all of them.
_EXPORTED = frozenset('export_dtype shard_gb'.split())  # no saved result depends on these
_MEASURED = frozenset(name_of(field) for field in fields(EvalSettings))
_TRAINED = frozenset(
  {'recipe', 'compare', 'teacher', *map(name_of, fields(TrainSettings))} - {'grad_clip', 'grad_accum'}
)
_CHOSEN = CHOOSING | {*HOW_MUCH}


# ---- one run at a time ----


@contextlib.contextmanager
def held(config: Config) -> Generator[None]:
  """Creates the folder and holds it for all processes of this run. A refused run leaves nothing behind.

  Raises:
    InputError: the folder cannot be written, or another run holds it.
  """
  work, lock = config.path(), None
  made = [path for path in (work / 'source', work / 'inputs.json', work, *work.parents) if not path.exists()]

  def take():
    nonlocal lock
    if hosts.is_leader():
      make(config)
      lock = _lock(work, config)

  try:
    hosts.leader_first(take)
    yield
  finally:
    if hosts.is_leader():
      _let_go(work, lock, made)


def make(config: Config):
  """Creates the folder. Raises InputError if it cannot be written."""
  work = config.path()
  try:
    work.mkdir(parents=True, exist_ok=True)
    probe = work / '.writable'
    probe.touch()
    probe.unlink(missing_ok=True)
  except OSError as e:
    if disk_is_full(e):
      raise
    raise InputError(
      'workdir', config.paths.workdir, f'cannot be written ({e.strerror}); choose another folder.'
    ) from e


def _lock(work: pathlib.Path, config: Config) -> int | None:
  """Returns a file descriptor that holds the lock; the kernel releases it when this process ends in any way."""
  path = work / LOCK
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
        break
      os.close(descriptor)  # the previous run removed the file between the two calls
    except BlockingIOError as e:
      holder = os.read(descriptor, 500).decode(errors='replace')
      os.close(descriptor)
      raise InputError(
        'workdir',
        config.paths.workdir,
        f'another run is using it ({holder or "just started"}); wait until it ends, or choose another folder.',
      ) from e
    except OSError as e:
      os.close(descriptor)
      if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        raise
      log(f'{work}: this file system has no locks ({e.strerror}); do not start a second run in this folder')
      return None
  now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
  os.truncate(descriptor, 0)
  os.write(descriptor, f'process {os.getpid()} on {socket.gethostname()} since {now}'.encode())
  return descriptor


def _let_go(work: pathlib.Path, lock: int | None, made: list[pathlib.Path]):
  """Ends `held`: removes the lock and, if the run never claimed the folder, everything that it created there."""
  claimed = (work / 'config.json').exists()
  if lock is not None:
    if not claimed:
      if work / 'source' in made:
        shutil.rmtree(work / 'source', ignore_errors=True)
      if work / 'inputs.json' in made:
        (work / 'inputs.json').unlink(missing_ok=True)
    (work / LOCK).unlink(missing_ok=True)
    os.close(lock)
  for folder in made:
    if folder == work or folder in work.parents:
      with contextlib.suppress(OSError):  # not empty, so it is in use
        folder.rmdir()


# ---- one run's settings ----


def claim_workdir(config: Config):
  """Checks that the folder is free or belongs to this run. Writes nothing.

  Raises:
    InputError: the folder contains something else, or a run with other settings that has not failed.
  """
  work = config.path()
  for names, right in ((FILES, pathlib.Path.is_file), (FOLDERS, pathlib.Path.is_dir)):
    if wrong := next((name for name in names if (work / name).exists() and not right(work / name)), None):
      kind = 'file' if names is FILES else 'folder'
      raise InputError(
        'workdir', config.paths.workdir, f'a run needs the name {wrong} in it for a {kind}; move what is there away.'
      )
  before = _settings(work)
  if before is None:
    names = sorted(p.name for p in work.iterdir() if not p.name.startswith('.shared-'))
    if foreign := next((name for name in names if name not in _EARLY), None):
      raise InputError(
        'workdir',
        config.paths.workdir,
        f'contains {foreign}, which is not from an earlier run; choose another folder.',
      )
    return
  differ = _differences(before, config)
  if differ and not _may_change(work):
    changes = '; '.join(f'--{key}={_shown(was)}, not {_shown(now)}' for key, (was, now) in differ.items())
    raise InputError(
      'workdir', config.paths.workdir, f'holds a run with {changes}; use its settings or choose another folder.'
    )


def record(config: Config, inputs: dict[str, str]):
  """Claims the folder for these settings and inputs. Removes results of a failed run that depend on changed settings.

  Args:
    inputs: {input: sha256}, see inputs.py.
  """
  work = config.path()
  if before := _settings(work):
    differ = _differences(before, config)
    if differ:
      changed = ', '.join(f'--{key}={as_text(now)}' for key, (_, now) in differ.items())
      log(f'the run in {work} failed before; resuming it with {changed}')
      _drop(work, set(differ))
  write_json(work / 'inputs.json', inputs)
  write_json(work / 'config.json', config.to_json())
  (work / FAILED).unlink(missing_ok=True)


@contextlib.contextmanager
def noting_failure(config: Config) -> Generator[None]:
  """Writes the error of a failed run to failed.txt, after which its settings may be changed."""
  path = config.path() / FAILED
  try:
    yield
  except Exception as e:
    if hosts.is_leader() and not disk_is_full(e):
      with contextlib.suppress(OSError):
        path.write_text(f'{reason(e)}\n\n{traceback.format_exc()}', encoding='utf-8')
    raise


def finished(config: Config) -> dict | None:
  """Returns the report of a finished run in this folder, or None, in all processes.

  Raises:
    InputError: the report cannot be read.
  """
  path = config.path() / 'report.json'

  def read():
    if not path.exists():
      return None
    try:
      return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
      raise InputError(f'{path}: cannot be read ({reason(e)}); remove it, and the run will write it again.') from e

  return hosts.broadcast_json(hosts.leader_first(lambda: read() if hosts.is_leader() else None))


def _settings(work: pathlib.Path) -> dict | None:
  """The settings of the run that claimed the folder; None if none did."""
  try:
    before = json.loads((work / 'config.json').read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):  # missing or damaged
    return None
  return before if isinstance(before, dict) and 'workdir' in before else None  # a model has a config.json as well


def _may_change(work: pathlib.Path) -> bool:
  return (work / FAILED).exists() and not (work / 'report.json').exists()


def _differences(before: dict, config: Config) -> dict[str, tuple]:
  """{setting: (old value, new value)}."""
  default = json.loads(json.dumps(defaults()))  # of settings that the version of that run did not have
  was, now = default | json.loads(json.dumps(settings_of_json(before))), config.to_json()
  for settings in (was, now):  # earlier versions wrote the default ratio; it means the same as unset
    if settings['ratio'] == list(DEFAULT_RATIO):
      settings['ratio'] = None
  return {key: (was[key], now[key]) for key in now if key not in FREE_ON_RESUME and not _same(was[key], now[key])}


def _shown(value) -> str:
  return 'unset' if value is None else as_text(value)


def _same(before, now) -> bool:
  """Whether a setting is unchanged. Two spellings of one path are the same."""
  if isinstance(before, dict) and isinstance(now, dict):
    return list(before) == list(now) and all(_same(before[name], now[name]) for name in now)
  if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
    return all(map(_same, before, now))
  if before == now or not (isinstance(before, str) and isinstance(now, str)):
    return before == now
  path, path_now = user_path(before), user_path(now)
  return path.exists() and path_now.exists() and path.samefile(path_now)


def _drop(work: pathlib.Path, changed: set[str]):
  """Removes the results that depend on the changed settings."""
  changed -= _EXPORTED
  if not changed:
    return
  if not changed <= _MEASURED:
    (work / tracking.STATE).unlink(missing_ok=True)  # trackers start a new run, because the steps differ
  stages = {path.stem: path for path in (work / 'stages').glob('*.json')}
  choices = {name for name in stages if name in ('gates', 'given') or name.startswith('choose-')}
  kept = set()
  if changed <= _MEASURED | _TRAINED | _CHOSEN:
    kept |= {'source'}
    kept |= {'dense'} if not changed & _MEASURED else set()
    kept |= choices if not changed & _CHOSEN else set()
  for name, path in stages.items():
    if name not in kept:
      path.unlink()
  for folder in (work / 'checkpoints').glob('*'):
    if not (changed <= _MEASURED or (folder.name == 'gates' and changed <= _MEASURED | _TRAINED)):
      shutil.rmtree(folder, ignore_errors=True)
