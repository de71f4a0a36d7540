"""Gated DeltaNet (arXiv 2412.06464): linear attention with a state of fixed size instead of keys and values.

  S_t = exp(g_t) · S_{t−1} · (1 − β_t·k_t·k_tᵀ) + β_t·k_t·v_tᵀ,  o_t = S_tᵀ·q_t

Dimensions besides those of decoder.py: C channels of the convolution, W width of the convolution, M value head, U width
of a value head, Z = M · U, A width of a key, c chunk, s and r tokens of a chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elder_jax.model.spec import Delta

CHUNK = 64
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class State(NamedTuple):
  """What a next token reads: the recurrent state, and the last inputs of the convolution."""

  state_BMAU: jax.Array
  tail_BWC: jax.Array  # of W − 1 tokens


def no_state(sizes: Delta, batch: int, dtype) -> State:
  """Returns the State before the first token."""
  state = jnp.zeros((batch, sizes.value_heads, sizes.key_dim, sizes.value_dim), jnp.float32)
  return State(state, jnp.zeros((batch, sizes.width - 1, sizes.channels), dtype))


def of_text(sizes: Delta, inputs: dict, act, length_B=None) -> tuple[jax.Array, State]:
  """Returns (o_BTMU, the State after the text) for whole texts.

  Args:
    inputs: channels_BTC, beta_BTM, decay_BTM (g) and kernel_CW, by name; see Block.of_delta.
    act: Activation after the convolution.
    length_B: Number of tokens of each text without padding; None: T.
  """
  x_BTC, W = inputs['channels_BTC'], sizes.width
  B, T, _ = x_BTC.shape
  padded_BPC = jnp.pad(x_BTC, ((0, 0), (W - 1, 0), (0, 0)))
  mixed_BTC = sum(padded_BPC[:, w : w + T] * inputs['kernel_CW'][None, None, :, w] for w in range(W))
  beta_BTM, decay_BTM = inputs['beta_BTM'], inputs['decay_BTM']
  if length_B is None:
    tail_BWC = padded_BPC[:, T:]
  else:
    inside_BT1 = (jnp.arange(T)[None] < length_B[:, None])[..., None]
    beta_BTM, decay_BTM = beta_BTM * inside_BT1, decay_BTM * inside_BT1
    last_BW = length_B[:, None] + jnp.arange(W - 1)[None]
    tail_BWC = jnp.take_along_axis(padded_BPC, last_BW[..., None], axis=1)
  q, k, v = _heads(sizes, act(mixed_BTC))
  out_BTMU, state_BMAU = _by_chunks(q, k, v, beta_BTM, decay_BTM)
  return out_BTMU, State(state_BMAU, tail_BWC)


def of_token(sizes: Delta, inputs: dict, act, before: State) -> tuple[jax.Array, State]:
  """Returns (o_B1MU, the next State) for one more token of each text. Arguments as in `of_text`, with T = 1."""
  seen_BWC = jnp.concatenate([before.tail_BWC, inputs['channels_BTC']], 1)
  mixed_B1C = jnp.sum(seen_BWC * inputs['kernel_CW'].T[None], 1, keepdims=True)
  q, k, v = (a[:, 0] for a in _heads(sizes, act(mixed_B1C)))
  beta_BM1, decay_BM11 = inputs['beta_BTM'][:, 0, :, None], jnp.exp(inputs['decay_BTM'][:, 0, :, None, None])
  state_BMAU = before.state_BMAU * decay_BM11
  change_BMU = (v - _einsum('BMAU,BMA->BMU', state_BMAU, k)) * beta_BM1
  state_BMAU = state_BMAU + k[..., None] * change_BMU[:, :, None]
  return _einsum('BMAU,BMA->BMU', state_BMAU, q)[:, None], State(state_BMAU, seen_BWC[:, 1:])


def _heads(sizes: Delta, mixed_BTC):
  """Returns queries, keys [B, T, M, A] and values [B, T, M, U] in float32.

  Queries and keys are normalised to unit length, and queries are then scaled by A^−½.
  """
  B, T, _ = mixed_BTC.shape
  keys, M = sizes.key_heads * sizes.key_dim, sizes.value_heads
  q, k, v = jnp.split(mixed_BTC.astype(jnp.float32), [keys, 2 * keys], -1)

  def unit(a):
    a = a.reshape(B, T, sizes.key_heads, sizes.key_dim)
    a = a * jax.lax.rsqrt(jnp.sum(a * a, -1, keepdims=True) + 1e-6)
    return jnp.repeat(a, M // sizes.key_heads, 2)

  return unit(q) * sizes.key_dim**-0.5, unit(k), v.reshape(B, T, M, sizes.value_dim)


def _by_chunks(q, k, v, beta_BTM, decay_BTM):
  """Returns (o_BTMU, the last state_BMAU). Uses matrix products within a chunk and the state between chunks.

  The updates u_s that the tokens of a chunk write solve (1 + L)·u = β·(v − exp(Σg)·Sᵀk), L strictly lower triangular.
  """
  B, T, M, _ = q.shape
  spare = -T % CHUNK

  def chunked(a):
    """[B, T, M, …] -> [c, B, M, s, …]."""
    a = jnp.pad(a, ((0, 0), (0, spare)) + ((0, 0),) * (a.ndim - 2))
    a = a.reshape(B, -1, CHUNK, *a.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(a, 3, 2), 1, 0)

  q, k, v, beta, decay = map(chunked, (q, k, v, beta_BTM, decay_BTM))
  total = jnp.cumsum(decay, -1)
  lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None, None]
  between = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf))
  k_beta = k * beta[..., None]
  system = _einsum('cBMsA,cBMrA->cBMsr', k_beta, k) * between
  both = jnp.concatenate([v * beta[..., None], k_beta * jnp.exp(total)[..., None]], -1)
  solved = jax.lax.linalg.triangular_solve(system, both, left_side=True, lower=True, unit_diagonal=True)
  change, seen = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
  within = _einsum('cBMsA,cBMrA->cBMsr', q, k) * between
  q = q * jnp.exp(total)[..., None]
  k = k * jnp.exp(total[..., -1:] - total)[..., None]

  def step(state_BMAU, chunk):
    q, k, change, seen, within, total = chunk
    new = change - _einsum('BMsA,BMAU->BMsU', seen, state_BMAU)
    out = _einsum('BMsA,BMAU->BMsU', q, state_BMAU) + _einsum('BMsr,BMrU->BMsU', within, new)
    state_BMAU = state_BMAU * jnp.exp(total)[..., None, None] + _einsum('BMsA,BMsU->BMAU', k, new)
    return state_BMAU, out

  zero = jnp.zeros((B, M, k.shape[-1], v.shape[-1]), jnp.float32)
  state_BMAU, out = jax.lax.scan(step, zero, (q, k, change, seen, within, total[..., -1]))
  out = jnp.moveaxis(jnp.moveaxis(out, 0, 1), 2, 3)
  return out.reshape(B, T + spare, M, -1)[:, :T], state_BMAU
