"""Skipped layers cost nothing; gradients do not depend on remat; gradients of the gates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import LAYERS
from plain_forward import alive_without
from plain_forward import decoder
from plain_forward import forward_jit
from plain_forward import tokens
from plain_forward import with_gates
import pytest

from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.training.penalty import delta_norm
from elder_jax.training.penalty import measure_of


def _with_nan_layer(model: Decoder, l: int) -> Decoder:
  model = pruning.with_gates(model, 1.0)
  model.layers = jax.tree.map(lambda a: a.at[l].set(jnp.nan), model.layers)
  return model


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_skipped_layer_is_not_read(remat):
  model, mode = decoder(), Mode(remat=remat)
  broken = _with_nan_layer(model, 2)
  assert np.isnan(forward_jit(broken, tokens(), alive_without(), mode)[2]).any()
  expected = forward_jit(model, tokens(), alive_without(2), mode)
  chex.assert_trees_all_equal(forward_jit(broken, tokens(), alive_without(2), mode), expected)
  # If both branches were computed and one selected, the lines above would pass, but the gradient would be 0 · NaN.
  grad = jax.jit(jax.grad(lambda m: jnp.sum(forward_jit(m, tokens(), alive_without(2), mode)[2] ** 2)))
  chex.assert_tree_all_finite(grad(broken))
  chex.assert_trees_all_equal(grad(broken), grad(model))
  assert all(not a[2].any() and a[1].any() for a in jax.tree.leaves(grad(model).layers))


def test_a_skipped_layer_is_not_computed():
  calls = []

  def counted(*args):
    jax.debug.callback(lambda: calls.append(1))  # called when the program runs, not when it is traced
    return delta_norm(*args, 'l2', 'token')

  run = jax.jit(lambda m, t, a: forward(m, t, a, measure=counted))
  for skipped in ([], [0], [1, 2, 4]):
    calls.clear()
    jax.block_until_ready(run(decoder(), tokens(), alive_without(*skipped)))
    jax.effects_barrier()
    assert len(calls) == LAYERS - len(skipped)


def test_other_alive_layers_and_gates_do_not_recompile():
  traces = []

  @jax.jit
  def run(model, tokens_BT, alive_L):
    traces.append(1)
    return forward(model, tokens_BT, alive_L)[0]

  model = decoder()
  outputs = [run(model, tokens(), alive_without(*s)) for s in ([], [1], [0, 4], [0, 1, 2, 3, 4])]
  outputs.append(run(with_gates(model, [0.5] * LAYERS), tokens(seed=1), alive_without()))
  assert len(traces) == 1
  assert len({np.asarray(x).tobytes() for x in outputs}) == len(outputs)


def test_remat_changes_no_gradient():
  def loss(model, mode):
    x_BTD, delta_L = forward(model, tokens(), alive_without(1), mode, measure=measure_of(mode))
    return jnp.mean(logits_of(model, x_BTD) ** 2) + jnp.sum(delta_L)

  grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  model = with_gates(decoder(), [0.9, 0.4, 0.3, 1.2, 0.7])
  expected = grad(model, Mode())
  assert all(np.abs(a).max() > 1e-4 for a in jax.tree.leaves(expected))
  for remat in ('dots', 'full'):
    chex.assert_trees_all_close(grad(model, Mode(remat=remat)), expected, rtol=1e-5, atol=1e-6)


def test_remat_recomputes():
  """Without this, a remat that does nothing would pass the test above."""

  def kept(remat):  # the number of values that the forward pass saves for the backward pass
    def run(m):
      return forward(m, tokens(), None, Mode(remat=remat))[0]

    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda m: jax.vjp(run, m)[1], decoder())))

  assert kept('none') > kept('dots') > kept('full')


@pytest.mark.parametrize('gate', ['residual', 'output'])
def test_gradient_of_the_gates(gate):
  """Against finite differences. Stage 1 trains only the gates."""
  gates, mode = np.array([0.9, 0.4, 0.3, 1.2, 0.7]), Mode(gate=gate)

  def loss(m):
    return jnp.mean(logits_of(m, forward(m, tokens(), None, mode)[0]) ** 2)

  both = jax.jit(jax.value_and_grad(loss))

  def f(gates):
    return both(with_gates(decoder(), gates))[0]

  gradient_L = both(with_gates(decoder(), gates))[1].gate_L[...]
  for l in range(LAYERS):
    step = 0.01 * np.eye(LAYERS)[l]
    slope = (f(gates + step) - f(gates - step)) / 0.02
    np.testing.assert_allclose(gradient_L[l], slope, rtol=0.02, atol=2e-3)
  assert np.abs(gradient_L).max() > 0.05
