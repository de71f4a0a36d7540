"""A full disk is reported in one sentence and leaves old files intact."""

import errno
import os

import pytest
from tiny import config_of

from elder_jax.commands import prune
from elder_jax.commands.flags import Parsed
from elder_jax.errors import disk_is_full
from elder_jax.log import MetricsFile
from elder_jax.log import write_whole

pytestmark = [
  # For damaged checkpoints, Orbax's threads may raise errors in a closed event loop after the test.
  pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'),
]


def test_a_full_disk_is_distinguished_from_other_failures():
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  try:
    raise ValueError('wrapped') from full
  except ValueError as e:
    assert disk_is_full(e)
  assert disk_is_full(full) and disk_is_full(OSError(errno.EDQUOT, 'quota'))
  assert disk_is_full(
    ValueError('RESOURCE_EXHAUSTED: Failed to write 83 bytes to file 20: No space left on device [os_e')
  )
  assert not disk_is_full(OSError(errno.EACCES, 'no')) and not disk_is_full(
    ValueError('RESOURCE_EXHAUSTED: out of memory')
  )


def test_a_full_disk_ends_the_command_in_one_sentence(settings, monkeypatch, capsys):
  def full(config):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(prune.series, 'run', full)
  monkeypatch.setattr(prune.hosts, 'start', lambda launch: None)
  monkeypatch.setattr(prune.preemption, 'listen', lambda: None)
  with pytest.raises(SystemExit) as caught:
    prune.run_config(Parsed({}, []), config_of(**settings).flat())
  err = capsys.readouterr().err
  assert caught.value.code == 1 and err.count('\n') == 1
  assert f'--workdir={settings["workdir"]}: the disk is full; free some space' in err


def test_a_failed_write_leaves_the_old_file_intact(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  log = MetricsFile(path)
  for step in range(3):
    log.write('gates', step, {'loss': 1.0})
  before = path.read_text()

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
      log.begin('gates', 1)
    with pytest.raises(OSError, match='No space'):
      write_whole(tmp_path / 'report.md', 'text')
  assert path.read_text() == before and not (tmp_path / 'report.md').exists()
  with path.open('a') as file:
    file.write('{"stage": "gates", "st')  # an incomplete line, as a full disk leaves it
  log.begin('gates', 1)
  assert path.read_text() == before.splitlines()[0] + '\n'
