"""The network against transformers, its gates and skips against plain loops."""

import dataclasses
import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import write_tiny_llama

from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model import decoder as model_lib
from elder_jax.model import pruning
from elder_jax.model.attention import QUERY_BLOCK
from elder_jax.model.attention import apply_rope
from elder_jax.model.attention import attention
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.layers import Block
from elder_jax.model.layers import rms_norm
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.training.penalty import delta_norm
from elder_jax.training.penalty import measure_of

SPEC = Spec(
  vocab_size=37,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  d_ff=20,
  norm_eps=1e-5,
  tied=False,
  rope_freq_RH=((1.0, 0.3, 0.05),),
)
LAYERS = 5
B, T = 2, 11
ALL_NORMS = [(p, s) for p in ('l2', 'l1') for s in ('token', 'relative', 'none')]


@functools.cache
def decoder(tied: bool = False) -> Decoder:
  """A random Decoder, the norms' scales too, so that none of them could be swapped unseen. Not to be written to."""

  @jax.jit
  def make():
    model = Decoder(dataclasses.replace(SPEC, tied=tied), LAYERS, jax.random.key(1))
    for i, norm in enumerate((model.layers.attn_norm.scale, model.layers.mlp_norm.scale, model.final_norm.scale)):
      norm.set_value(jax.random.uniform(jax.random.key(10 + i), norm.get_value().shape, minval=0.5, maxval=1.5))
    return model

  return make()


def with_gates(model: Decoder, gates) -> Decoder:
  model = pruning.with_gates(model, 1.0)
  model.gate_L.set_value(jnp.array(gates, jnp.float32))
  return model


def tokens(batch: int = B, length: int = T, vocab: int = SPEC.vocab_size, seed: int = 0):
  return np.random.default_rng(seed).integers(0, vocab, (batch, length), np.int32)


def alive_without(*skipped):
  return np.array([l not in skipped for l in range(LAYERS)])


def layer_of(model: Decoder, l: int) -> Block:
  return jax.tree.map(lambda a: a[l], model.layers)


@functools.partial(jax.jit, static_argnames='mode')
def forward_jit(model, tokens_BT, alive_L=None, mode=Mode()):
  x_BTD, delta_L = forward(model, tokens_BT, alive_L, mode, measure=measure_of(mode))
  return x_BTD, delta_L, logits_of(model, x_BTD)


@jax.jit
def layer_jit(block, x_BTD, rope):
  return block(x_BTD, jnp.float32(1), rope, Mode(gate='residual'))[0]


def by_hand(model: Decoder, tokens_BT, alive_L, mode: Mode):
  """forward as a Python loop, with the norms of the updates taken in numpy."""
  x_BTD = model.embed[...][tokens_BT]
  rope, _ = rope_and_window(model.spec, rope_tables(model.spec, tokens_BT.shape[1]), {})
  delta_L = []
  for l in range(model.num_layers):
    if not alive_L[l]:
      delta_L.append(0.0)
      continue
    # f(x) of the paper: the layer as it stands without a gate; both forms of the gate are written out from it.
    f_BTD = layer_jit(layer_of(model, l), x_BTD, rope)
    gate = model.gate_L[...][l]
    delta_L.append(plain_norm(np.asarray(f_BTD - x_BTD), np.asarray(x_BTD), mode.penalty, mode.penalty_scale))
    x_BTD = gate * f_BTD if mode.gate == 'output' else x_BTD + gate * (f_BTD - x_BTD)
  return rms_norm(x_BTD, model.final_norm.scale[...], model.spec.norm_eps), np.array(delta_L)


def plain_norm(d_BTD, x_BTD, penalty, scale):
  order = {'l1': 1, 'l2': 2}[penalty]
  if scale == 'none':
    return np.linalg.norm(d_BTD.ravel(), order)
  size_BT = np.linalg.norm(d_BTD, order, axis=-1)
  if scale == 'relative':
    size_BT = size_BT / np.linalg.norm(x_BTD, order, axis=-1)
  return size_BT.mean()


# ---- against transformers ----

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0}
TORCH_CASES = {
  'mha_untied': dict(num_key_value_heads=4, tie_word_embeddings=False),
  'gqa_tied': dict(num_key_value_heads=2),
  'mqa_untied': dict(num_key_value_heads=1, tie_word_embeddings=False),
  'wide_heads_tied': dict(head_dim=12, vocab_size=101),
  'narrow_heads_untied': dict(head_dim=6, tie_word_embeddings=False, vocab_size=101),
  'theta': dict(rope_parameters={'rope_type': 'default', 'rope_theta': 100.0}),
  'llama3_rope': dict(rope_parameters=LLAMA3),
  'linear_rope': dict(rope_parameters=LINEAR),
}


@pytest.mark.parametrize('config', TORCH_CASES.values(), ids=TORCH_CASES)
def test_logits_equal_those_of_torch(config, tmp_path):
  import torch
  import transformers

  folder = write_tiny_llama(tmp_path, initializer_range=0.1, **config)
  source = open_source(str(folder), tmp_path / 'scratch')
  model = load_model(source, 'float32')
  assert model.spec.tied == ('tie_word_embeddings' not in config) and (model.head is None) == model.spec.tied
  tokens_BT = tokens(2, 40, source.spec.vocab_size)
  reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    expected_BTV = reference(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  _, _, logits_BTV = forward_jit(model, tokens_BT)
  chex.assert_shape(logits_BTV, (2, 40, source.spec.vocab_size))
  chex.assert_type(logits_BTV, jnp.float32)
  assert np.std(expected_BTV) > 0.1
  np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-5)
  # The setting under test must matter at this length: positions by default rotation give other logits.
  if 'rope_parameters' in config:
    H = source.spec.head_dim
    default_H = tuple(float(10000.0 ** (-i / H)) for i in range(0, H, 2))
    other = forward_jit(_with_spec(model, rope_freq_RH=(default_H,)), tokens_BT)[2]
    assert np.max(np.abs(other - expected_BTV)) > 1e-2


def _with_spec(model: Decoder, **changes) -> Decoder:
  other = jax.tree.map(lambda a: a, model)
  other.spec = dataclasses.replace(model.spec, **changes)
  return other


# ---- gates, skips, removal ----


def test_gate_zero_is_the_removed_layer():
  model, tokens_BT = decoder(), tokens()
  gated_x, _, gated = forward_jit(with_gates(model, [1, 0, 1, 0, 1]), tokens_BT)
  pruned_x, _, pruned = forward_jit(pruning.prune(model, [1, 3]), tokens_BT)
  np.testing.assert_array_equal(gated_x, pruned_x)
  np.testing.assert_array_equal(gated, pruned)
  assert np.max(np.abs(gated - forward_jit(model, tokens_BT)[2])) > 1e-2


def _ungated(block, x_BTD, gate, rope, mode, window):
  """The layer of the paper's dense network; no gate anywhere."""
  del gate, mode, window
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
def test_skipped_is_pruned_bit_for_bit(gate, removed):
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


def test_prune_and_with_gates_leave_their_argument_alone():
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
  """forward with and without jit: the gates' two forms and the norms of the updates."""

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(('output', 'l2', 'token'), *(('residual', *norm) for norm in ALL_NORMS))
  def test_forward_is_a_loop_over_the_layers(self, *mode):
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
  def test_without_alive_all_layers_run(self):
    run = self.variant(lambda m, t, a: forward(m, t, a))
    all_alive = run(decoder(), tokens(), jnp.ones(LAYERS, bool))
    chex.assert_trees_all_equal(self.variant(lambda m, t: forward(m, t))(decoder(), tokens()), all_alive)


def test_gate_forms_differ_where_the_gate_is_not_one():
  model = with_gates(decoder(), [0.5] * LAYERS)
  a, b = (forward_jit(model, tokens(), mode=Mode(gate=g))[0] for g in ('residual', 'output'))
  assert np.max(np.abs(a - b)) > 1e-2


def test_delta_is_the_ungated_update():
  model = decoder()
  first = forward_jit(model, tokens())[1][0]
  np.testing.assert_array_equal(forward_jit(with_gates(model, [0.2] * LAYERS), tokens())[1][0], first)


@pytest.mark.parametrize('gate', ['residual', 'output'])
@pytest.mark.parametrize('t', [0, 5, T - 1])
def test_causality(t, gate):
  model, mode = with_gates(decoder(), [0.7, 1.3, 0.2, 1.0, -0.4]), Mode(gate=gate)
  before, after = tokens(), tokens()
  after[:, t] = (after[:, t] + 1) % SPEC.vocab_size
  a, b = (np.asarray(forward_jit(model, x, mode=mode)[2]) for x in (before, after))
  np.testing.assert_array_equal(a[:, :t], b[:, :t])
  assert np.all(np.max(np.abs(a - b), -1)[:, t:] > 1e-6)  # each later token reads it


def test_rows_of_a_batch_do_not_see_each_other():
  both = forward_jit(decoder(), tokens())[2]
  for b in range(B):
    np.testing.assert_allclose(forward_jit(decoder(), tokens()[b : b + 1])[2][0], both[b], rtol=1e-5, atol=1e-5)


# ---- skipped layers cost nothing ----


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
  # A select in place of a branch would pass the lines above, but not this: 0 · NaN.
  grad = jax.jit(jax.grad(lambda m: jnp.sum(forward_jit(m, tokens(), alive_without(2), mode)[2] ** 2)))
  chex.assert_tree_all_finite(grad(broken))
  chex.assert_trees_all_equal(grad(broken), grad(model))
  assert all(not a[2].any() and a[1].any() for a in jax.tree.leaves(grad(model).layers))


def test_a_skipped_layer_is_not_computed():
  calls = []

  def counted(*args):
    jax.debug.callback(lambda: calls.append(1))  # when the program runs, not when it is traced
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
  """Else three times 'none' would pass the test above."""

  def kept(remat):  # numbers that the forward pass leaves for the backward pass
    def run(m):
      return forward(m, tokens(), None, Mode(remat=remat))[0]

    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(lambda m: jax.vjp(run, m)[1], decoder())))

  assert kept('none') > kept('dots') > kept('full')


@pytest.mark.parametrize('gate', ['residual', 'output'])
def test_gradient_of_the_gates(gate):
  """By differences: the gates are all that stage 1 learns."""
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


def test_bfloat16_is_near_float32_and_its_logits_are_float32():
  model, half = decoder(), Mode(dtype='bfloat16')
  x_BTD, delta_L, logits_BTV = forward_jit(model, tokens(), mode=half)
  assert (x_BTD.dtype, delta_L.dtype, logits_BTV.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  exact_BTD, exact_L, exact_BTV = forward_jit(model, tokens())
  np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.15)
  np.testing.assert_allclose(delta_L, exact_L, rtol=0.03)
  # Weights that are stored in bfloat16 and those that are rounded on use are the same network.
  stored = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
  stored.gate_L.set_value(model.gate_L[...])
  np.testing.assert_array_equal(forward_jit(stored, tokens(), mode=half)[2], logits_BTV)


@pytest.mark.parametrize(
  'dtype, head_dim, expected',
  [('bfloat16', 64, 'cudnn'), ('bfloat16', 6, 'xla'), ('bfloat16', 256, 'xla'), ('float32', 64, 'xla')],
)
def test_on_a_gpu_cudnn_is_asked_for_what_it_has(dtype, head_dim, expected, monkeypatch):
  asked = []
  monkeypatch.setattr(model_lib.sharding, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *_, implementation, **__: asked.append(implementation))
  attention(*[jnp.zeros((1, 4, 2, head_dim), dtype)] * 3)
  assert asked == [expected]


# ---- the norm of an update ----


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_equals_numpy(penalty, scale):
  d_BTD, x_BTD = np.random.default_rng(3).normal(size=(2, B, T, 8)).astype(np.float32)
  got = delta_norm(jnp.array(d_BTD), jnp.array(x_BTD), penalty, scale)
  chex.assert_shape(got, ())
  chex.assert_type(got, jnp.float32)
  np.testing.assert_allclose(got, plain_norm(d_BTD, x_BTD, penalty, scale), rtol=1e-5)
  half = delta_norm(jnp.array(d_BTD, jnp.bfloat16), jnp.array(x_BTD, jnp.bfloat16), penalty, scale)
  chex.assert_type(half, jnp.float32)


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_at_zero(penalty, scale):
  x_BTD = jnp.array(np.random.default_rng(3).normal(size=(B, T, 8)), jnp.float32)
  value, gradient = jax.value_and_grad(delta_norm)(jnp.zeros_like(x_BTD), x_BTD, penalty, scale)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)
  # One token of zeros among others, and x of zeros, which `relative` divides by.
  some = x_BTD.at[0, 3].set(0)
  _, gradients = jax.value_and_grad(delta_norm, (0, 1))(some, jnp.zeros_like(x_BTD), penalty, scale)
  chex.assert_tree_all_finite(gradients)
  np.testing.assert_array_equal(gradients[0][0, 3], 0)
  assert np.all(np.abs(gradients[0][1]) > 0)


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_gradient(penalty, scale):
  d_BTD, x_BTD = np.random.default_rng(3).normal(size=(2, B, T, 8)).astype(np.float32)
  to_d, to_x = jax.grad(delta_norm, (0, 1))(jnp.array(d_BTD), jnp.array(x_BTD), penalty, scale)
  axis = None if scale == 'none' else -1
  order = {'l1': 1, 'l2': 2}[penalty]
  direction = np.sign(d_BTD)
  if penalty == 'l2':
    direction = d_BTD / np.sqrt(np.sum(d_BTD**2, axis=axis, keepdims=True))
  size = np.linalg.norm(x_BTD, order, axis=-1, keepdims=True) if scale == 'relative' else 1.0
  np.testing.assert_allclose(to_d, direction / size / (1 if scale == 'none' else B * T), rtol=1e-5)
  np.testing.assert_array_equal(to_x, 0)  # the denominator of `relative` is a constant


# ---- attention ----


@pytest.mark.parametrize('length, kv_heads', [(5, 2), (8, 2), (16, 4), (21, 1)])
def test_blocks_of_queries_equal_the_whole_square(length, kv_heads, monkeypatch):
  monkeypatch.setitem(QUERY_BLOCK, 'cpu', 8)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  random = np.random.default_rng(0)
  q, k, v = (jnp.array(random.normal(size=(B, length, n, 6)), jnp.float32) for n in (4, kv_heads, kv_heads))
  expected = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
  squares, whole = [], jax.nn.dot_product_attention

  def noted(q, k, v, **how):
    squares.append((q.shape[1], k.shape[1]))
    return whole(q, k, v, **how)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', noted)
  np.testing.assert_allclose(jax.jit(attention)(q, k, v), expected, rtol=1e-5, atol=1e-6)
  ends = [*range(8, length, 8), length]
  assert squares == [(end - start, end) for start, end in zip([0, *ends], ends)]


def test_query_head_reads_its_own_key_value_head():
  """Query head n reads key/value head n // (N/K), as Hugging Face's repeat_kv has it."""
  random = np.random.default_rng(0)
  q, k, v = (jnp.array(random.normal(size=(B, 7, n, 6)), jnp.float32) for n in (4, 2, 2))
  repeated = (jnp.array(np.repeat(a, 2, axis=2)) for a in (k, v))
  np.testing.assert_allclose(jax.jit(attention)(q, k, v), jax.jit(attention)(q, *repeated), rtol=1e-5, atol=1e-6)
