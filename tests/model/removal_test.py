"""Gates of 0, skipped layers and removed layers are equivalent; forward equals a plain loop over the layers."""

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import ALL_NORMS
from plain_forward import LAYERS
from plain_forward import SPEC
from plain_forward import B
from plain_forward import T
from plain_forward import alive_without
from plain_forward import by_hand
from plain_forward import decoder
from plain_forward import forward_jit
from plain_forward import tokens
from plain_forward import with_gates
import pytest

from elder_jax.model import pruning
from elder_jax.model.attention import apply_rope
from elder_jax.model.attention import attention
from elder_jax.model.decoder import forward
from elder_jax.model.layers import Block
from elder_jax.model.layers import rms_norm
from elder_jax.model.spec import Mode
from elder_jax.training.penalty import measure_of


def test_a_gate_of_zero_equals_a_removed_layer():
  model, tokens_BT = decoder(), tokens()
  gated_x, _, gated = forward_jit(with_gates(model, [1, 0, 1, 0, 1]), tokens_BT)
  pruned_x, _, pruned = forward_jit(pruning.prune(model, [1, 3]), tokens_BT)
  np.testing.assert_array_equal(gated_x, pruned_x)
  np.testing.assert_array_equal(gated, pruned)
  assert np.max(np.abs(gated - forward_jit(model, tokens_BT)[2])) > 1e-2


def _ungated(block, x_BTD, gate, rope, mode, window, mixer):
  """A layer of the dense network, without gates."""
  del gate, mode, window, mixer
  h_BTD = rms_norm(x_BTD, block.attn_norm.scale[...], SPEC.norm_eps)
  q_BTNH, k_BTKH, v_BTKH = (jnp.einsum('BTD,DNH->BTNH', h_BTD, w[...]) for w in (block.wq, block.wk, block.wv))
  a_BTNH = attention(apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope), v_BTKH)
  y_BTD = x_BTD + jnp.einsum('BTNH,NHD->BTD', a_BTNH, block.wo[...])
  h_BTD = rms_norm(y_BTD, block.mlp_norm.scale[...], SPEC.norm_eps)
  gate_BTF, up_BTF = (jnp.einsum('BTD,DF->BTF', h_BTD, w[...]) for w in (block.w_gate, block.w_up))
  y_BTD = y_BTD + jnp.einsum('BTF,FD->BTD', jax.nn.silu(gate_BTF) * up_BTF, block.w_down[...])
  return y_BTD, y_BTD - x_BTD


def test_gates_of_one_change_no_bit(monkeypatch):
  def run(gate):
    return jax.jit(lambda m, t: forward(m, t, None, Mode(gate=gate)))(decoder(), tokens())

  (residual_BTD, residual_L), (output_BTD, output_L) = run('residual'), run('output')
  monkeypatch.setattr(Block, '__call__', _ungated)
  dense_BTD, dense_L = run('residual')
  np.testing.assert_array_equal(residual_BTD, dense_BTD)
  np.testing.assert_array_equal(output_BTD, dense_BTD)
  np.testing.assert_array_equal(residual_L, output_L)
  np.testing.assert_allclose(residual_L, dense_L, rtol=1e-5)


SUBSETS = ([0], [4], [3], [1, 2], [3, 0], [0, 1, 2, 3], [4, 2, 0], [])


@pytest.mark.parametrize('gate, removed', [*(('residual', s) for s in SUBSETS), ('output', [0]), ('output', [1, 2])])
def test_skipping_equals_pruning_bit_for_bit(gate, removed):
  model, tokens_BT, mode = decoder(), tokens(), Mode(gate=gate)
  pruned = pruning.prune(with_gates(model, [0.3] * LAYERS), removed)  # prune sets the gates back to 1
  kept = pruning.kept_layers(LAYERS, removed)
  assert pruned.num_layers == len(kept) == LAYERS - len(removed)
  assert pruning.num_params(pruned) < pruning.num_params(model) or not removed
  skipped_x, skipped_L, skipped = forward_jit(model, tokens_BT, alive_without(*removed), mode)
  pruned_x, pruned_L, logits_BTV = forward_jit(pruned, tokens_BT, mode=mode)
  np.testing.assert_array_equal(skipped_x, pruned_x)
  np.testing.assert_array_equal(skipped, logits_BTV)
  np.testing.assert_array_equal(np.asarray(skipped_L)[kept], pruned_L)
  assert not np.asarray(skipped_L)[sorted(removed)].any()


def test_prune_and_with_gates_do_not_change_their_argument():
  model = with_gates(decoder(), [0.1, 0.2, 0.3, 0.4, 0.5])
  before = jax.tree.map(np.array, model)
  pruning.prune(model, [2])
  pruning.with_gates(model, 0.0)
  chex.assert_trees_all_equal(jax.tree.leaves(before), jax.tree.leaves(model))


def test_prune_keeps_the_order_of_the_layers():
  model = decoder()
  pruned = pruning.prune(model, [3, 1])
  for mine, theirs in zip(jax.tree.leaves(pruned.layers), jax.tree.leaves(model.layers)):
    np.testing.assert_array_equal(mine, theirs[np.array([0, 2, 4])])
  np.testing.assert_array_equal(pruned.embed[...], model.embed[...])
  np.testing.assert_array_equal(pruned.head[...], model.head[...])


class ForwardTest(chex.TestCase):
  """forward with and without jit: both forms of gates, and the norms of the updates."""

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(('output', 'l2', 'token'), *(('residual', *norm) for norm in ALL_NORMS))
  def test_forward_equals_a_loop_over_the_layers(self, *mode):
    mode = Mode(*mode)
    model = with_gates(decoder(), [0.9, 0.4, -0.3, 1.2, 0.7])
    alive_L = alive_without(3)
    run = self.variant(lambda m, t, a: forward(m, t, a, mode, measure=measure_of(mode)))
    x_BTD, delta_L = run(model, tokens(), alive_L)
    chex.assert_shape((x_BTD, delta_L), ((B, T, SPEC.d_model), (LAYERS,)))
    expected_BTD, expected_L = by_hand(model, tokens(), np.asarray(alive_L), mode)
    chex.assert_trees_all_close(x_BTD, expected_BTD, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(delta_L, jnp.array(expected_L, jnp.float32), rtol=1e-5)
    assert delta_L[3] == 0 and np.all(np.delete(np.asarray(delta_L), 3) > 0.1)

  @chex.variants(with_jit=True, without_jit=True)
  def test_without_alive_L_all_layers_run(self):
    run = self.variant(lambda m, t, a: forward(m, t, a))
    all_alive = run(decoder(), tokens(), jnp.ones(LAYERS, bool))
    chex.assert_trees_all_equal(self.variant(lambda m, t: forward(m, t))(decoder(), tokens()), all_alive)


def test_the_forms_of_gates_differ_for_gates_other_than_one():
  model = with_gates(decoder(), [0.5] * LAYERS)
  a, b = (forward_jit(model, tokens(), mode=Mode(gate=g))[0] for g in ('residual', 'output'))
  assert np.max(np.abs(a - b)) > 1e-2


def test_delta_is_the_ungated_update():
  model = decoder()
  first = forward_jit(model, tokens())[1][0]
  np.testing.assert_array_equal(forward_jit(with_gates(model, [0.2] * LAYERS), tokens())[1][0], first)
