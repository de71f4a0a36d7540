"""Gated delta-nets: against the recurrence token by token, on a mesh, with padding, and mixed with attention layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import on_one_and_eight
from tiny import tiny_decoder

from elder_jax.model import delta
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import forward
from elder_jax.model.spec import Delta
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb
from elder_jax.training.losses import next_token_nll

SIZES = Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=4, width=3)
MIXED = dict(delta=SIZES, mixer_L=(1, 0, 1, 1), attn_gate=True, qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 12), np.int32)


def inputs(B: int, T: int) -> dict:
  random = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  return {
    'channels_BTC': normal(B, T, SIZES.channels),
    'beta_BTM': jax.nn.sigmoid(normal(B, T, 4)),
    'decay_BTM': -jax.nn.softplus(normal(B, T, 4)),
    'kernel_CW': normal(SIZES.channels, 3),
  }


def by_the_formula(given: dict) -> tuple[np.ndarray, np.ndarray]:
  """Computes (o_BTMU, the last state) token by token, in float64."""
  x, beta, g, kernel = (
    np.asarray(given[n], np.float64) for n in ('channels_BTC', 'beta_BTM', 'decay_BTM', 'kernel_CW')
  )
  B, T, C = x.shape
  padded = np.concatenate([np.zeros((B, 2, C)), x], 1)
  mixed = sum(padded[:, w : w + T] * kernel[:, w] for w in range(3))
  mixed = mixed / (1 + np.exp(-mixed))
  out, S = np.zeros((B, T, 4, 4)), np.zeros((B, 4, 8, 4))
  for b, t, m in np.ndindex(B, T, 4):
    q, k = (mixed[b, t, i * 16 :][:16].reshape(2, 8)[m // 2] for i in (0, 1))
    q, k = (a / np.sqrt(a @ a + 1e-6) for a in (q, k))
    v = mixed[b, t, 32:].reshape(4, 4)[m]
    S[b, m] = np.exp(g[b, t, m]) * (np.eye(8) - beta[b, t, m] * np.outer(k, k)) @ S[b, m]
    S[b, m] += beta[b, t, m] * np.outer(k, v)
    out[b, t, m] = S[b, m].T @ q / np.sqrt(8)
  return out, S


@pytest.mark.parametrize('T', [1, 2, 63, 64, 150])
def test_chunks_compute_the_recurrence(T):
  given = inputs(2, T)
  expected, last = by_the_formula(given)
  out, state = jax.jit(lambda given: delta.of_text(SIZES, given, jax.nn.silu))(given)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  np.testing.assert_allclose(state.state_BMAU, last, atol=2e-5)


def test_tokens_continue_after_a_padded_text():
  given, lengths = inputs(3, 80), np.array([1, 33, 70])
  whole, _ = delta.of_text(SIZES, given, jax.nn.silu)
  _, state = delta.of_text(SIZES, given, jax.nn.silu, jnp.asarray(lengths))
  for step in range(4):
    at = lengths + step
    one = {n: a if n == 'kernel_CW' else a[np.arange(3), at][:, None] for n, a in given.items()}
    out, state = delta.of_token(SIZES, one, jax.nn.silu, state)
    np.testing.assert_allclose(out[:, 0], np.asarray(whole)[np.arange(3), at], atol=2e-5)


def test_a_mesh_computes_the_same_as_one_device():
  model = tiny_decoder(4, **MIXED)

  def run(model, batches):
    def loss(model, tokens_BT):
      return next_token_nll(model, forward(model, tokens_BT)[0], tokens_BT)[0]

    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(model, batches[0]))

  one, eight = on_one_and_eight(model, [TOKENS], jax.devices(), run)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
    np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize('kept', [[0, 2, 3], [1], [0, 1]])
def test_kept_layers_keep_their_mixer(kept):
  model = tiny_decoder(4, **MIXED)
  pruned = pruning.prune(model, [l for l in range(4) if l not in kept])
  assert pruned.spec.mixer_L == tuple(MIXED['mixer_L'][l] for l in kept)
  skipped, _ = forward(model, TOKENS, np.isin(np.arange(4), kept))
  np.testing.assert_allclose(forward(pruned, TOKENS)[0], skipped, atol=1e-5)


def test_weights_that_a_layer_does_not_read_are_not_counted():
  model = tiny_decoder(4, **MIXED)
  attention = 3 * 16 * 16 + 2 * 16 * 2 * 4 - 16 * 16 + 2 * 4  # wq, gate; wk, wv; norms
  net = 16 * (48 + 16 + 4 + 4) + 48 * 3 + 4 + 4 + 4
  shared = 16 * 16 + 3 * 16 * 24 + 2 * 16
  assert pruning.num_params(model) == attention + 3 * net + 4 * shared + 40 * 16 + 16


def test_lora_wraps_the_projections():
  model = tiny_decoder(4, **MIXED)
  wrapped = lora.attach(model, 2, 4.0, 0)
  assert isinstance(wrapped.layers.w_delta, lora.Lora) and isinstance(wrapped.layers.w_delta_gate, lora.Lora)
  np.testing.assert_array_equal(forward(lora.merge(wrapped), TOKENS)[0], forward(model, TOKENS)[0])


@pytest.mark.parametrize('removed', [[1], [2]])
def test_absorb_lowers_the_error_with_either_mixer_before_the_gap(removed):
  reports = []
  absorb.absorb(tiny_decoder(4, **MIXED), removed, [TOKENS], Mode(), lambda *about: reports.append(about))
  ((_, _, before, after),) = reports
  assert after < 0.9 * before
