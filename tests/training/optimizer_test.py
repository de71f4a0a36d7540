"""The optimisers' updates: weight decay, dtypes of moments, first steps, gradient clipping."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import leaves
from tiny import named
from tiny_step import L
from tiny_step import rate
from tiny_step import tiny

from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import init_state
from elder_jax.training.step import train_mask

NORMS = {'.final_norm.scale.value', '.layers.attn_norm.scale.value', '.layers.mlp_norm.scale.value'}


@pytest.mark.parametrize('kind', ['adamw', 'adafactor', 'lion'])
def test_weight_decay_applies_to_matrices_only(kind):
  model = tiny()
  mask = train_mask(model, 'all')
  tx = make_optimizer(mask, rate, 0.5, 1.0, kind)
  state, _ = init_state(model, mask, tx)
  updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, state.trained), state.opt_state, state.trained)
  weights = leaves(state.trained)
  assert {'.embed.value', '.head.value', '.layers.w_down.value'} | NORMS < set(weights)
  for name, update in leaves(updates).items():
    expected = 0 * weights[name] if name in NORMS else -0.01 * 0.5 * weights[name]
    np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)


def updates_of(tx, mask, steps: int = 1):
  """(updates, optimiser state, gradients) of the last of `steps` steps on random gradients; updates by name."""
  state, _ = init_state(tiny(), mask, tx)
  opt_state = state.opt_state
  update = jax.jit(tx.update)
  for i in range(steps):
    grads = jax.tree.map(lambda a, i=i: 0.01 * jax.random.normal(jax.random.key(i), a.shape), state.trained)
    updates, opt_state = update(grads, opt_state, state.trained)
  return leaves(updates), opt_state, leaves(grads)


def test_the_default_is_optax_adamw_bit_for_bit():
  mask = train_mask(tiny(), 'blocks')
  plain = optax.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0)), mask)
  mine, theirs = updates_of(make_optimizer(mask, rate, 0.0, 1.0), mask, 3), updates_of(plain, mask, 3)
  chex.assert_trees_all_equal(mine[0], theirs[0])
  chex.assert_trees_all_equal(leaves(mine[1]), leaves(theirs[1]))


@pytest.mark.parametrize('kind', ['adamw', 'lion'])
def test_bfloat16_applies_to_first_moments_only(kind):
  mask = train_mask(tiny(), 'blocks')
  full, half = (updates_of(make_optimizer(mask, rate, 0.0, 1.0, kind, d), mask, 3) for d in ('float32', 'bfloat16'))

  def dtypes(state, name):
    return {a.dtype.name for n, a in named(state).items() if f'.{name}.' in n}

  assert dtypes(full[1], 'mu') == {'float32'} and dtypes(half[1], 'mu') == {'bfloat16'}
  assert dtypes(half[1], 'nu') == dtypes(full[1], 'nu') == ({'float32'} if kind == 'adamw' else set())
  # lion uses signs, and those of values near 0 may flip.
  different = [np.mean(np.abs(half[0][n] - full[0][n]) > 0.02 * 0.01) for n in full[0]]
  assert max(different) < 0.02


@pytest.mark.parametrize('kind', ['adafactor', 'lion'])
def test_first_step_is_the_sign_of_the_gradient(kind):
  # lion takes the sign of its mean with a moment of 0. Unfactored, adafactor's update is g / sqrt(g^2).
  mask = train_mask(tiny(), 'blocks')
  updates, state, grads = updates_of(make_optimizer(mask, rate, 0.0, 1.0, kind), mask)
  for name in updates:
    np.testing.assert_allclose(updates[name], -0.01 * np.sign(grads[name]), rtol=1e-4, err_msg=name)


def test_adafactor_keeps_rows_and_columns():
  shape, tx = (L, 128, 256), make_optimizer({'w': True}, rate, 0.0, 1e9, 'adafactor')
  w, g = {'w': jnp.zeros(shape)}, {'w': jax.random.normal(jax.random.key(0), shape)}
  state = tx.init(w)
  assert sum(a.size for a in jax.tree.leaves(state)) < L * (128 + 256) + 10
  updates, _ = tx.update(g, state, w)
  # Shazeer and Stern's algorithm 4 per layer, then clipped to a root mean square of 1 and scaled by the rate.
  squares_LRC = np.asarray(g['w'], np.float64) ** 2
  row_LR, column_LC = squares_LRC.mean(2), squares_LRC.mean(1)
  v_LRC = row_LR[:, :, None] * column_LC[:, None] / row_LR.mean(1)[:, None, None]
  u_LRC = np.asarray(g['w']) / np.sqrt(v_LRC)
  u_LRC /= max(1.0, np.sqrt((u_LRC**2).mean()))
  np.testing.assert_allclose(updates['w'], -0.01 * u_LRC, rtol=1e-4)


@pytest.mark.parametrize('scale, norm', [(1e-3, None), (10.0, 0.25), (1e4, 0.25)])
def test_gradients_are_clipped_by_their_global_norm(scale, norm):
  model = tiny()
  mask = train_mask(model, 'blocks')
  tx = make_optimizer(mask, rate, 0.0, 0.25)
  state, _ = init_state(model, mask, tx)
  grads = jax.tree.map(lambda a: scale * a, state.trained)
  grads = jax.tree.map(lambda a: a / optax.global_norm(state.trained), grads)  # now their norm is `scale`
  _, opt_state = jax.jit(tx.update)(grads, state.opt_state, state.trained)
  mu = optax.tree_utils.tree_get(opt_state, 'mu')
  np.testing.assert_allclose(float(optax.global_norm(mu)), 0.1 * (scale if norm is None else norm), rtol=1e-4)
