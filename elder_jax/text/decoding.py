"""Decoding with a key-value cache on the devices.

Prompts are padded on the right, so a token's slot in the cache is its position. Causal masking hides the padding's
entries; new tokens overwrite them one by one.

Dimensions beyond those of model/decoder.py: S slot of the cache, E end-of-sequence id, R room for new tokens.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model import delta
from elder_jax.model.attention import attention
from elder_jax.model.attention import kinds
from elder_jax.model.attention import masked_attention
from elder_jax.model.attention import mixer_of
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_at
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import final_norm
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec

PAD = 64  # prompts and room for new tokens are padded to multiples of this, so that few programs are compiled


END = -1  # stands for every new token after the end of the sequence


NOT_FINITE = -2  # stands for a token whose logits are not finite; its sequence ends there


class Cache(NamedTuple):
  """Rotated keys and values of all layers in the computation dtype, and the states of delta-nets."""

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  state: delta.State | None = None  # of all layers; None: the model has no delta-nets


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is sampled; static under jit. The three settings apply in this order."""

  temperature: float = 0.0  # below 1e-6: greedy, the most probable token
  top_k: int = 0  # sample from the k most probable tokens; 0: from all
  top_p: float = 1.0  # sample from the most probable tokens whose probabilities together reach p

  def check(self):
    """Raises InputError for a setting out of range."""
    if not 0 <= self.temperature < math.inf:
      raise InputError('temperature', self.temperature, 'must be 0 or more and finite.')
    if self.top_k < 0:
      raise InputError('top_k', self.top_k, 'is negative; give 0 for no limit.')
    if not 0 < self.top_p <= 1:
      raise InputError('top_p', self.top_p, 'must be above 0 and at most 1.')


def prefill(model: Decoder, tokens_BT, lengths_B, capacity: int, mode: Mode = Mode()):
  """Runs the prompts and fills the cache.

  Args:
    tokens_BT: int32; row b holds lengths_B[b] >= 1 tokens, then padding of any value.
    lengths_B: int32, tokens of each prompt.
    capacity: slots of the cache, at least T.
    mode: only its dtype is used. Gates are 1, here and in `decode_step`.

  Returns:
    (float32 logits_BV of the token after each prompt, Cache). The head is applied to the last token only.

  Raises:
    ValueError: the prompts do not fit into the cache.
  """
  T = tokens_BT.shape[1]
  if capacity < T:
    raise ValueError(f'prompts of {T} tokens do not fit into a cache of {capacity}')
  tables = rope_tables(model.spec, T, jnp.max(lengths_B))
  spare = ((0, 0), (0, capacity - T), (0, 0), (0, 0))
  nothing = delta.no_state(model.spec.delta, tokens_BT.shape[0], mode.dtype) if model.spec.delta else None

  def layer(x_BTD, scanned):
    block, kind = scanned
    rope, window = rope_and_window(model.spec, tables, kind)
    q_BTNH, k_BTKH, v_BTKH = block.qkv(x_BTD, rope)

    def attended(state):
      attended_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, window, *block.scores(), block.spec.window_L)
      return block.gated(attended_BTNH, x_BTD), state

    def by_delta(state):
      del state
      return block.of_delta(x_BTD, length_B=lengths_B)

    mixed_BTNH, state = _mixed(model.spec, kind, attended, by_delta, nothing)
    x_BTD = _add(block, x_BTD, mixed_BTNH)
    return sharding.constrain_batch(x_BTD), Cache(jnp.pad(k_BTKH, spare), jnp.pad(v_BTKH, spare), state)

  layers = model.layers, kinds(model.spec)
  x_BTD, cache = jax.lax.scan(layer, embed(model, tokens_BT, mode), layers)
  last_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
  return logits_of(model, final_norm(model, last_B1D))[:, 0], cache


def decode_step(model: Decoder, cache: Cache, token_B, position_B, mode: Mode = Mode()):
  """Runs one token per row, each at its own position.

  Args:
    cache: of `prefill` or of the step before.
    token_B: int32.
    position_B: int32, below the cache's number of slots.
    mode: as in `prefill`.

  Returns:
    (float32 logits_BV of the next token, the Cache with this token). Under jit, the cache is updated in place if a loop
    carries it or the caller donates it.
  """
  tables = rope_at(model.spec, position_B)
  rows_B, slots_S = jnp.arange(position_B.shape[0]), jnp.arange(cache.k_LBSKH.shape[2])
  back_B11S = (position_B[:, None] - slots_S[None])[:, None, None]

  def layer(carry, scanned):
    x_1BD, cache = carry
    block, l, kind = scanned
    rope, window = rope_and_window(model.spec, tables, kind)
    seen_B11S = back_B11S >= 0 if window is None else (back_B11S >= 0) & (back_B11S < window)
    q_1BNH, *new = block.qkv(x_1BD, rope)
    k_LBSKH, v_LBSKH = (a_LBSKH.at[l, rows_B, position_B].set(a_1BKH[0]) for a_LBSKH, a_1BKH in zip(cache[:2], new))

    def attended(state):
      # Not model.attention: there is one query, and each row attends to a different number of keys.
      attended_B1NH = masked_attention(q_1BNH.swapaxes(0, 1), k_LBSKH[l], v_LBSKH[l], seen_B11S, *block.scores())
      return block.gated(attended_B1NH.swapaxes(0, 1), x_1BD), state

    def by_delta(state):
      mixed_B1NH, state = block.of_delta(x_1BD.swapaxes(0, 1), state)
      return mixed_B1NH.swapaxes(0, 1), state

    states = cache.state
    mixed_1BNH, state = _mixed(model.spec, kind, attended, by_delta, jax.tree.map(lambda a: a[l], states))
    states = jax.tree.map(lambda a, new: a.at[l].set(new), states, state)
    x_1BD = sharding.constrain_batch(_add(block, x_1BD, mixed_1BNH), 1)
    return (x_1BD, Cache(k_LBSKH, v_LBSKH, states)), None

  # Apart from attention, a block works token by token. So the batch lies on the token axis, as one row of B tokens
  # instead of B rows of one token: the rotary tables have a row per token.
  x_1BD = embed(model, token_B[None], mode, position_B, batch_axis=1)
  layers = model.layers, jnp.arange(model.num_layers), kinds(model.spec)
  (x_1BD, cache), _ = jax.lax.scan(layer, (x_1BD, cache), layers)
  return logits_of(model, final_norm(model, x_1BD))[0], cache


def _mixed(spec: Spec, kind: dict, attended, by_delta, state):
  """Runs attention or a delta-net, whichever the layer has; both are functions of the State before this token.

  Returns:
    (the input of the out projection, the delta-net's State).
  """
  mixer = mixer_of(spec, kind)
  if isinstance(mixer, int):
    return (by_delta if mixer else attended)(state)
  return jax.lax.cond(mixer, by_delta, attended, state)


def _add(block, x_BTD, attended_BTNH):
  """The residual stream after a layer, from the output of its attention."""
  attn_BTD, mlp_BTD = block.updates(x_BTD, attended_BTNH)
  return (x_BTD + attn_BTD) + mlp_BTD


def truncate(logits_BV, top_k: int, top_p: float):
  """Sets logits to -inf outside the top_k most probable tokens, then outside the most probable that together reach top_p.

  Tokens as probable as the last one kept are kept too. The most probable token is always kept.
  """

  def below(logits_BV, least_B1):
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)

  if 0 < top_k < logits_BV.shape[-1]:
    logits_BV = below(logits_BV, jax.lax.top_k(logits_BV, top_k)[0][:, -1:])
  if top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    inside_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p  # the tokens before this one do not reach top_p
    logits_BV = below(logits_BV, jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), -1, keepdims=True))
  return logits_BV


def sample(logits_BV, key_B, sampling: Sampling):
  """One token per row, int32 [B]. key_B: a random key per row; ignored if the sampling is greedy."""
  if sampling.temperature < 1e-6:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  # Shift the largest logit to 0 first, else a low temperature overflows and gives inf - inf.
  logits_BV = (logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / sampling.temperature
  logits_BV = truncate(logits_BV, sampling.top_k, sampling.top_p)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('capacity', 'room', 'sampling', 'mode'))
def run_prompts(
  model, tokens_BT, lengths_B, row_B, eos_E, limit, seed, *, capacity, room, sampling=Sampling(), mode=Mode()
):
  """Continues the prompts, in one program. Stops when every row has ended.

  Args:
    tokens_BT, lengths_B, capacity, mode: as in `prefill`; capacity is at least the longest length + limit.
    row_B: int32, the index of a row in the random stream; negative: the row is padding and generates nothing.
    eos_E: ids that end a sequence; may be empty.
    limit: largest number of new tokens, 1 to room.
    seed: a random key.
    room: R.
    sampling: how tokens are sampled.

  Returns:
    New tokens_BR, int32: END after the end of a sequence; NOT_FINITE also ends one.
  """
  key_B = jax.vmap(functools.partial(jax.random.fold_in, seed))(row_B)

  def draw(n, logits_BV, tokens_BR, done_B):
    token_B = sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(key_B, n), sampling)
    finite_B = jnp.all(jnp.isfinite(logits_BV), -1)
    new_B = jnp.where(finite_B, token_B, NOT_FINITE)
    ended_B = done_B | (finite_B & jnp.any(token_B[:, None] == eos_E[None], -1))
    return token_B, tokens_BR.at[:, n].set(jnp.where(ended_B, END, new_B)), ended_B | ~finite_B

  def step(state):
    n, cache, token_B, tokens_BR, done_B = state
    logits_BV, cache = decode_step(model, cache, token_B, lengths_B + (n - 1), mode)
    return n + 1, cache, *draw(n, logits_BV, tokens_BR, done_B)

  logits_BV, cache = prefill(model, tokens_BT, lengths_B, capacity, mode)
  first = draw(0, logits_BV, jnp.full((tokens_BT.shape[0], room), END, jnp.int32), row_B < 0)
  state = (jnp.int32(1), cache, *first)
  return sharding.replicate(jax.lax.while_loop(lambda s: (s[0] < limit) & ~jnp.all(s[-1]), step, state)[3])
