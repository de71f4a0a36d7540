"""Checkpoints: when they are due, which are kept, and the fallback to an earlier one if the newest is damaged."""

import os
import pathlib
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import names
from tiny import slow

from elder_jax.training import checkpoints
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.step import TrainState

pytestmark = [
  # With damaged checkpoints, Orbax's threads may use an event loop that is closed already, after the end of the test.
  pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'),
]


def state_at(step: int, scale: float = 1.0) -> TrainState:
  w = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)  # large enough to get its own data file
  return TrainState(jnp.int32(step), {'w': jnp.asarray(scale * w)}, {'mu': jnp.ones((2, 3))})


def checkpoints_of(folder, *steps) -> Checkpoints:
  """Checkpoints of `state_at(step, step)` at these steps."""
  checkpoints = Checkpoints(folder, 1, 100)
  for step in steps:
    checkpoints.save(state_at(step, step))
  checkpoints.wait()
  return checkpoints


def test_due_by_steps_and_at_the_end(tmp_path):
  def due(every):
    return [s for s in range(1, 8) if Checkpoints(tmp_path / 'c', every, 7).due(s)]

  assert due(2) == [2, 4, 6, 7] and due(0) == [7]


def test_due_by_time_since_the_last_one(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  checkpoints = Checkpoints(tmp_path / 'c', 0, 50, minutes=0.5)
  due = []
  for step in range(1, 9):
    now[0] += 12
    if checkpoints.due(step):
      due.append(step)
      checkpoints.save(state_at(step))
  checkpoints.wait()
  assert due == [3, 6]


@pytest.mark.parametrize('keep', [1, 3])
def test_only_the_last_checkpoints_are_kept(tmp_path, keep):
  checkpoints = Checkpoints(tmp_path / 'a' / 'c', 1, 100, keep=keep)
  start = state_at(0)
  assert checkpoints.latest(start) is start
  for step in (2, 4, 6, 8, 10):
    checkpoints.save(state_at(step, step))
  checkpoints.wait()
  assert names(tmp_path / 'a' / 'c') == sorted(['10', '8', '6'][:keep])
  # A killed run can leave a checkpoint that Orbax has not renamed yet, and one too many.
  (tmp_path / 'a' / 'c' / '12.orbax-checkpoint-tmp').mkdir()
  checkpoints_of(tmp_path / 'b', 9)
  (tmp_path / 'b' / '9').rename(tmp_path / 'a' / 'c' / '9')
  again = Checkpoints(tmp_path / 'a' / 'c', 1, 100, keep=keep)
  chex.assert_trees_all_equal(again.latest(start), state_at(10, 10))
  assert '12.orbax-checkpoint-tmp' not in names(tmp_path / 'a' / 'c')
  again.save(state_at(12))
  again.wait()
  assert names(tmp_path / 'a' / 'c') == sorted(['12', '10', '9'][:keep])
  again.clear()
  assert not (tmp_path / 'a' / 'c').exists()


def test_donating_the_state_after_save_does_not_change_the_checkpoint(tmp_path):
  step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
  state = step(TrainState(jnp.int32(0), {'w': jnp.zeros((1000, 1000))}, {}))
  checkpoints = Checkpoints(tmp_path / 'c', 1, 9)
  for _ in range(3):
    checkpoints.save(state)
    for _ in range(5):
      state = step(state)
  checkpoints.wait()
  saved = checkpoints.latest(state)
  assert int(saved.step) == 11 and np.unique(saved.trained['w']).tolist() == [11.0]


def damage_content(file: pathlib.Path):
  """Changes bytes but not the length, like silent corruption of a disk."""
  content = bytearray(file.read_bytes())
  for i in range(len(content) // 2, len(content), 7):
    content[i] ^= 0x55
  file.write_bytes(content)


def data_files(folder: pathlib.Path, where: str = '*') -> list[pathlib.Path]:
  """The files that hold the arrays."""
  files = [p for p in folder.rglob(f'{where}/d/*') if p.is_file()]
  assert files
  return files


@pytest.mark.parametrize('where', [slow('state'), 'ocdbt.process_0'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda file: os.truncate(file, file.stat().st_size // 2),
    lambda file: os.truncate(file, 0),
    damage_content,
    os.unlink,
  ],
  ids=['half', 'empty', 'changed', 'gone'],
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys, damage, where):
  checkpoints_of(tmp_path / 'gates', 3, 5)
  for file in data_files(tmp_path / 'gates' / '5', where):
    damage(file)
  restored = Checkpoints(tmp_path / 'gates', 1, 9).latest(state_at(0))
  chex.assert_trees_all_equal(restored, state_at(3, 3))
  lines = capsys.readouterr().err.splitlines()
  assert lines[1:] == ['elder_jax: Resuming training at step 3 of 9.']
  assert f'{tmp_path}/gates/5: this checkpoint cannot be read (' in lines[0]
  assert lines[0].endswith('resuming from step 3') and len(lines[0]) < 500
  again = checkpoints_of(tmp_path / 'gates', 5)
  assert names(tmp_path / 'gates') == ['3', '5']
  chex.assert_trees_all_equal(again.latest(state_at(0)), state_at(5, 5))


def test_checksums_detect_changed_values_that_can_be_read(tmp_path, capsys):
  sums = checkpoints._sums
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints, '_sums', lambda leaves: sums([a.at[(0,) * a.ndim].add(1) for a in leaves]))
    checkpoints_of(tmp_path / 'c', 5)
  start = state_at(0)
  assert Checkpoints(tmp_path / 'c', 1, 9).latest(start) is start
  assert capsys.readouterr().err.endswith('its checksums do not match); c starts from the beginning\n')


def test_training_starts_from_the_beginning_if_all_checkpoints_are_damaged(tmp_path, capsys):
  checkpoints_of(tmp_path / 'regularize', 3, 5)
  for file in data_files(tmp_path / 'regularize'):
    os.truncate(file, 1)
  start = state_at(0)
  assert Checkpoints(tmp_path / 'regularize', 1, 9).latest(start) is start
  told = capsys.readouterr().err.splitlines()
  assert [line.rpartition('; ')[2] for line in told] == ['resuming from step 3', 'regularize starts from the beginning']
