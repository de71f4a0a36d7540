"""The training loop: losses that are not finite, the order of logging and saving, resuming from a checkpoint."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves
from tiny_step import BATCHES_SBT
from tiny_step import L
from tiny_step import begin
from tiny_step import terms

from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.loop import NonFiniteLoss
from elder_jax.training.loop import run_steps
from elder_jax.training.step import TrainState


class Recorder:
  """A stand-in for Checkpoints."""

  def __init__(self, *steps):
    self.steps, self.saved = steps, []

  def due(self, step: int) -> bool:
    return step in self.steps

  def save(self, state):
    self.saved.append(int(state.step))

  def wait(self):
    pass


@pytest.mark.parametrize('due', [(1, 2, 3, 4, 5), (3,), (2, 3), (4,), ()])
def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(due):
  step, state, frozen = begin('blocks')
  bad = terms(delta_weight_L=np.array([0, np.nan, 0], np.float32))
  logged, recorder = [], Recorder(*due)
  with pytest.raises(NonFiniteLoss, match='loss of step 3 is nan'):
    run_steps(
      step,
      state,
      (frozen, None),
      5,
      BATCHES_SBT,
      lambda i: bad if i == 2 else terms(),
      lambda i, m: logged.append(i),
      recorder,
    )
  assert recorder.saved == [s for s in due if s < 3] and logged == [0, 1]


def fake_step(losses, grad_norms):
  def step(state, fixed, batch, terms):
    return state._replace(step=state.step + 1), {'loss': losses[batch], 'grad_norm': grad_norms[batch]}

  return step


def test_a_gradient_that_is_not_finite_ends_training_even_if_the_loss_is_finite():
  recorder, state = Recorder(1, 2, 3), TrainState(jnp.int32(0), None, None)
  step = fake_step([1.0, 1.0, 1.0], [1.0, np.inf, 1.0])
  with pytest.raises(NonFiniteLoss, match='gradient of step 2 is inf'):
    run_steps(step, state, None, 3, range(9), lambda i: {}, lambda i, m: None, recorder)
  assert recorder.saved == [1]


@pytest.mark.parametrize('due', [(), (1, 2, 3), (2,), (3,)])
@pytest.mark.parametrize('start', [0, 1, 3])
def test_each_step_is_logged_once_and_before_it_is_saved(start, due):
  events, recorder = [], Recorder(*due)
  recorder.save = lambda state: events.append(('save', int(state.step)))
  state = TrainState(jnp.int32(start), None, None)
  step = fake_step([5.0, 6.0, 7.0], [1.0] * 3)

  def log(i, m):
    return events.append((i, float(m['loss'])))

  state = run_steps(step, state, None, 3, range(9), lambda i: {}, log, recorder)
  expected = []
  for i in range(start, 3):
    expected += [(i, 5.0 + i)] + ([('save', i + 1)] if i + 1 in due else [])
  assert events == expected and int(state.step) == 3


def fit(step, state, frozen, steps, checkpoint=None):
  def change(i):
    return terms(delta_weight_L=np.full(L, i, np.float32))

  return run_steps(step, state, (frozen, None), steps, BATCHES_SBT, change, lambda i, m: None, checkpoint)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
  step, state, frozen = begin('all')
  straight = leaves(fit(step, state, frozen, 6))
  checkpoints = Checkpoints(tmp_path / 'c', 3, 6)
  _, state, frozen = begin('all')
  half = leaves(fit(step, state, frozen, 3, checkpoints))
  _, fresh, frozen = begin('all')
  restored = Checkpoints(tmp_path / 'c', 3, 6).latest(fresh)
  assert int(restored.step) == 3
  chex.assert_trees_all_equal(leaves(restored), half)
  resumed = leaves(fit(step, restored, frozen, 6))
  assert list(resumed) == list(straight)
  chex.assert_trees_all_equal(resumed, straight)
