"""Method elder (stage 1): its rounds, the layers it may choose, and its loss."""

import functools

import chex
import jax
import numpy as np
import pytest
from tiny import Endless

from elder_jax.methods import elder
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.training import losses
from elder_jax.training import step as step_module
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.settings import TrainSettings
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask
from elder_jax.training.trainer import train

SPEC = Spec(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)
L = 5
BATCH_BT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (4, 9), np.int32)
MAKE_STEP = make_step


@functools.cache
def step_of(lr: float):
  """The step of `learn`. Here it depends on the learning rate only, so it is compiled once for all tests."""

  def rate(step):
    return lr + 0.0 * step

  return MAKE_STEP(make_optimizer(train_mask(random_model(), 'gates'), rate, 0.0, 1e9), Mode(), 1, rate)


@functools.cache
def random_model() -> Decoder:
  return Decoder(SPEC, L, jax.random.key(0))


def with_gates(*values: float) -> Decoder:
  model = jax.tree.map(lambda a: a, random_model())
  model.gate_L.set_value(np.float32(values))
  return model


def learn(model, num_remove=2, iterative=True, steps=2, lambda1=1e-4, candidates=(1, 2, 3), lr=0.02):
  settings = elder.GateSettings(
    selection='iterative' if iterative else 'one_shot',
    steps=steps,
    lr=lr,
    lambda1=lambda1,
    protect_first=candidates[0],
    protect_last=L - 1 - candidates[-1],
  )
  log = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_module, 'make_step', lambda *_: step_of(lr))
    chosen, history = elder.learn(
      model, num_remove, settings, Mode(), Endless(lambda i: BATCH_BT), lambda r, i, m: log.append((r, i, m)), clip=1e9
    )
  return chosen, np.array(history), log


@pytest.fixture(scope='module')
def trained() -> Decoder:
  """A model trained on the batch, so that lowering the gate of any layer raises the LM loss."""
  settings = TrainSettings(steps=30, lr=5e-3, lambda2=0.0)
  return train(random_model(), [], settings, Mode(), Endless(lambda i: BATCH_BT))


def without_effect(model: Decoder, *layers: int) -> Decoder:
  """Returns a copy in which the updates of these layers are exactly 0."""
  model = jax.tree.map(lambda a: a, model)
  for param in (model.layers.wo, model.layers.w_down):
    param.set_value(param.get_value().at[np.array(layers)].set(0.0))
  return model


def test_iterative_skips_the_layers_it_chose(trained):
  before = [np.array(a) for a in jax.tree.leaves(trained)]
  chosen, history, log = learn(trained, num_remove=3, steps=2)
  assert sorted(chosen) == [1, 2, 3] and history.shape == (3, L)
  assert [(r, i) for r, i, _ in log] == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
  for r, layer in enumerate(chosen):
    left = [l for l in (1, 2, 3) if l not in chosen[:r]]
    assert layer == min(left, key=lambda l: abs(history[r, l]))
    assert (history[r:, layer] == history[r, layer]).all()  # its gate does not change any more
  for r in (0, 1):
    alive = [l for l in range(L) if l not in chosen[: r + 1]]
    assert (history[r + 1, alive] != history[r, alive]).all()  # the other gates continue from their values
    assert np.abs(history[r + 1, alive] - history[r, alive]).max() < 0.1
  for r, _, metrics in log:
    np.testing.assert_array_equal(metrics['delta_L'] == 0, np.isin(np.arange(L), chosen[:r]))
  chex.assert_trees_all_equal([np.array(a) for a in jax.tree.leaves(trained)], before)


def test_one_shot_chooses_all_layers_after_one_round(trained):
  model = without_effect(trained, 1, 3)
  chosen, history, log = learn(model, num_remove=2, iterative=False, steps=4)
  assert sorted(chosen) == [1, 3] and history.shape == (1, L)
  assert [(r, i) for r, i, _ in log] == [(0, i) for i in range(4)]
  assert history[0, [1, 3]].max() < history[0, [0, 2, 4]].min()


def test_only_l1_moves_the_gate_of_a_layer_without_effect_and_it_is_chosen_first(trained):
  model = without_effect(trained, 2)
  chosen, history, _ = learn(model, steps=4)
  assert chosen[0] == 2
  np.testing.assert_allclose(history[0, 2], 1 - 4 * 0.02, rtol=1e-4)  # four full Adam steps, since λ1 is constant


def test_without_l1_the_gate_of_a_layer_without_effect_does_not_move(trained):
  _, history, _ = learn(without_effect(trained, 2), num_remove=1, steps=3, lambda1=0.0)
  assert history[0, 2] == 1.0 and (history[0, [0, 1, 3, 4]] != 1.0).all()


@pytest.mark.parametrize('iterative', [True, False])
def test_protected_layers_are_never_chosen_even_with_the_lowest_gates(iterative):
  model = with_gates(0.1, 1.2, 1.1, 1.0, 0.2)
  chosen, _, _ = learn(model, num_remove=3, iterative=iterative, steps=1, lr=1e-6)
  assert chosen == [3, 2, 1]


def test_nothing_to_remove():
  chosen, history, log = learn(random_model(), num_remove=0, iterative=False)
  assert chosen == [] and len(history) == 0 and log == []


def test_gates_are_compared_by_absolute_value():
  chosen, _, _ = learn(with_gates(1, -3, 2, 0.5, 1), num_remove=3, iterative=False, steps=1, lr=1e-6)
  assert chosen == [3, 2, 1]


def test_the_loss_adds_lambda1_times_the_gates_of_alive_layers():
  model = with_gates(1, -2, 4, 8, 16)
  alive_L = np.array([True, True, False, True, False])
  terms = {
    'alive_L': alive_L,
    'gate_weight_L': np.where(alive_L, np.float32(0.25), np.float32(0)),
    'delta_weight_L': np.zeros(L, np.float32),
  }
  loss, parts = losses.loss(model, BATCH_BT, terms, Mode())
  assert float(parts['gate_l1']) == 0.25 * (1 + 2 + 8)
  np.testing.assert_allclose(float(loss), float(parts['lm_loss']) + 0.25 * 11, rtol=1e-6)
  # A skipped layer has the same effect as a removed one.
  cut = pruning.prune(model, [2, 4])
  cut.gate_L.set_value(np.float32([1, -2, 8]))
  none = {
    'alive_L': np.ones(3, bool),
    'gate_weight_L': np.zeros(3, np.float32),
    'delta_weight_L': np.zeros(3, np.float32),
  }
  lm, _ = losses.loss(cut, BATCH_BT, none, Mode())
  np.testing.assert_allclose(float(parts['lm_loss']), float(lm), rtol=1e-6)


def test_learn_passes_lambda1_to_the_loss_for_alive_layers(trained):
  chosen, history, log = learn(trained, num_remove=2, steps=1, lambda1=0.5)
  assert float(log[0][2]['gate_l1']) == 0.5 * L
  alive = [l for l in range(L) if l != chosen[0]]
  np.testing.assert_allclose(log[1][2]['gate_l1'], 0.5 * np.abs(history[0, alive]).sum(), rtol=1e-6)
