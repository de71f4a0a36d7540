"""A training step: which leaves train, gradient accumulation, dtypes, and token weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import leaves
from tiny import named
from tiny_step import BATCHES_SBT
from tiny_step import SPEC
from tiny_step import TRACES
from tiny_step import L
from tiny_step import begin
from tiny_step import rate
from tiny_step import terms
from tiny_step import tiny

from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import combine
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import partition
from elder_jax.training.step import train_mask


def trains(name: str, what: str) -> bool:
  return {'gates': 'gate_L' in name, 'blocks': '.layers.' in name, 'all': 'gate_L' not in name}[what]


@pytest.mark.parametrize('what', ['gates', 'blocks', 'all'])
def test_only_the_named_leaves_train(what):
  before = leaves(tiny())
  step, state, frozen = begin(what)
  assert set(named(state.trained)) == {name for name in before if trains(name, what)}
  assert set(named(frozen)) == {name for name in before if not trains(name, what)}
  state, _ = step(state, (frozen, None), BATCHES_SBT[0], terms())
  assert int(state.step) == 1
  after = leaves(combine(state.trained, frozen))
  assert list(after) == list(before)  # in the order of the tree, too
  for name in before:
    assert np.array_equal(after[name], before[name]) != trains(name, what), name
  assert set(named(state.trained)) == {name for name in before if trains(name, what)}


@pytest.mark.parametrize('what', ['gates', 'blocks', 'all'])
def test_only_trained_leaves_have_optimiser_state(what):
  _, state, _ = begin(what)
  shapes = sorted(a.shape for a in jax.tree.leaves(state.opt_state) if a.ndim)
  assert shapes == sorted(2 * [a.shape for name, a in leaves(tiny()).items() if trains(name, what)])


def test_gradient_accumulation_changes_nothing():
  model = tiny()
  mask = train_mask(model, 'all')
  tx = optax.masked(optax.sgd(0.5), mask)  # SGD, because Adam's update would hide a wrong scale
  results = []
  for parts in (1, 2, 4):
    state, frozen = init_state(model, mask, tx)
    state, metrics = make_step(tx, Mode(), parts, rate)(state, (frozen, None), BATCHES_SBT[0], terms())
    results.append((leaves(state.trained), jax.device_get(metrics)))
  moved = max(np.abs(a - b).max() for a, b in zip(results[0][0].values(), leaves(partition(model, mask)[0]).values()))
  assert moved > 1e-2
  chex.assert_trees_all_close(results[0], results[1], atol=1e-6, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[2], atol=1e-6, rtol=1e-5)


def test_masters_of_a_bfloat16_model_are_float32():
  model = tiny(jnp.bfloat16)
  step, state, frozen = begin('blocks', model, 'bfloat16')
  state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms())
  assert {a.dtype for a in jax.tree.leaves(state.trained)} == {jnp.dtype('float32')}
  assert {a.dtype for a in jax.tree.leaves(state.opt_state) if a.ndim} == {jnp.dtype('float32')}
  assert frozen.embed.get_value().dtype == jnp.bfloat16 and frozen.gate_L.get_value().dtype == jnp.float32
  assert metrics['loss'].dtype == jnp.float32 and metrics['delta_L'].dtype == jnp.float32
  # bfloat16 cannot hold such steps: adding 0.01·0.01 to a weight of 1 would be lost.
  norm = np.asarray(state.trained.layers.attn_norm.scale.get_value())
  assert (norm != norm.astype(jnp.bfloat16).astype(np.float32)).any()
  _, gates, _ = begin('gates', model, 'bfloat16')
  assert gates.trained.gate_L.get_value().dtype == jnp.float32


def test_the_callers_model_outlives_donation():
  model = tiny()
  before = leaves(model)
  step, state, frozen = begin('blocks', model)
  given = state.trained.layers.wq.get_value()
  state, _ = step(state, (frozen, None), BATCHES_SBT[0], terms())
  state, _ = step(state, (frozen, None), BATCHES_SBT[1], terms())
  assert given.is_deleted()  # the state was donated
  chex.assert_trees_all_equal(leaves(model), before)


def test_changed_terms_do_not_recompile():
  step, state, frozen = begin('blocks')
  losses = []
  for i, change in enumerate(
    (
      {},
      {'alive_L': np.array([True, False, True])},
      {'delta_weight_L': np.zeros(L, np.float32)},
      {'gate_weight_L': np.ones(L, np.float32)},
    )
  ):
    state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms(**change))
    losses.append(float(metrics['loss']))
    if not i:
      first = len(TRACES)
  assert len(TRACES) == first > 0 and step._cache_size() == 1
  assert len(set(losses)) == 4


WEIGHT_BT = np.random.default_rng(3).integers(0, 2, (4, 9)).astype(np.float32)
WEIGHT_BT[1] = 0  # a micro-batch in which no token counts
WEIGHT_BT[2, :4] = 0.25


@pytest.mark.parametrize('taught', [False, True])
def test_gradient_accumulation_changes_nothing_with_token_weights(taught):
  """Micro-batches with fewer counted tokens weigh less: the mean is over the tokens of the whole batch."""
  model, mask = tiny(), train_mask(tiny(), 'all')
  tx = optax.masked(optax.sgd(0.5), mask)
  now, teacher = terms(weight_BT=WEIGHT_BT), None
  if taught:
    now |= {'distill': np.float32(0.4), 'hidden': np.float32(0.5), 'kept_L': np.array([0, 1, 2], np.int32)}
    teacher = Decoder(SPEC, L, jax.random.key(7))
  results = []
  for parts in (1, 2, 4):
    state, frozen = init_state(model, mask, tx)
    state, metrics = make_step(tx, Mode(), parts, rate)(state, (frozen, teacher), BATCHES_SBT[0], now)
    results.append((leaves(state.trained), jax.device_get(metrics)))
  nll_BT = -jax.nn.log_softmax(logits_of(model, forward(model, BATCHES_SBT[0])[0]))
  nll_BT = np.take_along_axis(np.asarray(nll_BT)[:, :-1], BATCHES_SBT[0][:, 1:, None], -1)[..., 0]
  expected = np.sum(nll_BT * WEIGHT_BT[:, :-1]) / np.sum(WEIGHT_BT[:, :-1])
  np.testing.assert_allclose(results[0][1]['lm_loss'], expected, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[1], atol=1e-6, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[2], atol=1e-6, rtol=1e-5)
  assert ('kl' in results[0][1]) == ('hidden' in results[0][1]) == taught


@pytest.mark.parametrize('parts', [1, 2])
def test_a_batch_in_which_no_token_counts_has_a_loss_of_0(parts):
  model, mask = tiny(), train_mask(tiny(), 'blocks')
  tx = make_optimizer(mask, rate, 0.0, 1.0)
  state, frozen = init_state(model, mask, tx)
  before = leaves(state.trained)
  zeros_L = np.zeros(L, np.float32)
  now = terms(weight_BT=np.zeros((4, 9), np.float32), gate_weight_L=zeros_L, delta_weight_L=zeros_L)
  now |= {'distill': np.float32(0.4), 'hidden': np.float32(0.5), 'kept_L': np.arange(L, dtype=np.int32)}
  step = make_step(tx, Mode(), parts, rate)
  state, metrics = step(state, (frozen, Decoder(SPEC, L, jax.random.key(7))), BATCHES_SBT[0], now)
  assert all(metrics[name] == 0 for name in ('loss', 'lm_loss', 'kl', 'hidden', 'grad_norm'))
  chex.assert_trees_all_equal(leaves(state.trained), before)


def test_weights_of_1_equal_no_weights():
  step, *_ = begin('blocks')
  results = []
  for more in ({}, {'weight_BT': np.ones((4, 9), np.float32)}):
    _, state, frozen = begin('blocks')
    state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms(**more))
    results.append(jax.device_get(metrics))
  chex.assert_trees_all_close(*results, rtol=1e-6)


def test_metrics_of_a_step():
  step, state, frozen = begin('blocks')
  _, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms())
  m = {k: np.asarray(v) for k, v in metrics.items()}
  np.testing.assert_allclose(m['loss'], m['lm_loss'] + m['gate_l1'] + m['penalty'], rtol=1e-6)
  np.testing.assert_allclose(m['penalty'], 0.1 * m['delta_L'].sum(), rtol=1e-6)
  np.testing.assert_allclose(m['gate_l1'], 0.01 * L, rtol=1e-6)
  np.testing.assert_allclose(m['lr'], 0.01, rtol=1e-6)
  assert m['grad_norm'] > 0 and m['delta_L'].shape == (L,) and (m['delta_L'] > 0).all()
