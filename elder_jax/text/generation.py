"""Generation with a cache of keys and values: greedy or sampled, prompts of different lengths side by side.

Prompts are padded on the right, so that a token's slot in the cache is its position. What the padding left in the cache
is hidden from the queries before it, and overwritten by the new tokens one by one.

`python -m elder_jax.generate --model=FOLDER --prompt='Once upon a time'` prints what follows a prompt.

Dimensions beyond those of model.py: S slot of the cache, E end-of-sequence id, R room for new tokens.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import pathlib
import tempfile
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.commands import cli
from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf import checkpoint_hf
from elder_jax.hf import safetensors_files
from elder_jax.model import decoder
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.text import data

PAD = 64  # prompts and room for new tokens are padded to multiples of it, so that few programs serve all
END = -1  # in the place of new tokens from the end of the sequence on
NOT_FINITE = -2  # in the place of a token whose logits are not finite; its sequence ends there


class Cache(NamedTuple):
  """Keys, rotated, and values of all layers in the type of computation."""

  k_LBSKH: jax.Array
  v_LBSKH: jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn; static under jit. The three apply in this order."""

  temperature: float = 0.0  # 0, or less than 1e-6: the most probable token
  top_k: int = 0  # only the k most probable; 0: all
  top_p: float = 1.0  # only the most probable that together reach p

  def check(self):
    """Raises InputError."""
    if not 0 <= self.temperature < math.inf:
      raise InputError(f'--temperature={self.temperature} must be 0 or more and finite.')
    if self.top_k < 0:
      raise InputError(f'--top_k={self.top_k} is negative; give 0 for no limit.')
    if not 0 < self.top_p <= 1:
      raise InputError(f'--top_p={self.top_p} must be above 0 and at most 1.')


# ---- on the device ----


def prefill(model: Decoder, tokens_BT, lengths_B, capacity: int, mode: Mode = Mode()):
  """Runs the prompts.

  Args:
    tokens_BT: int32; row b is lengths_B[b] >= 1 tokens, then anything.
    capacity: slots of the cache, at least T.
    mode: only its dtype matters; gates are taken as 1, here and in `decode_step`.

  Returns:
    (float32 logits_BV of the token after each prompt, Cache). The head sees no other token than the last.

  Raises:
    ValueError: the prompts do not fit into the cache.
  """
  T = tokens_BT.shape[1]
  if capacity < T:
    raise ValueError(f'prompts of {T} tokens do not fit into a cache of {capacity}')
  tables = decoder.rope_tables(model.spec, T)
  spare = ((0, 0), (0, capacity - T), (0, 0), (0, 0))

  def layer(x_BTD, scanned):
    block, kind = scanned
    rope, window = decoder.rope_and_window(model.spec, tables, kind)
    q_BTNH, k_BTKH, v_BTKH = block.qkv(x_BTD, rope)
    x_BTD = _add(block, x_BTD, decoder.attention(q_BTNH, k_BTKH, v_BTKH, window, *model.spec.scores()))
    return sharding.constrain_batch(x_BTD), Cache(jnp.pad(k_BTKH, spare), jnp.pad(v_BTKH, spare))

  layers = model.layers, decoder.kinds(model.spec)
  x_BTD, cache = jax.lax.scan(layer, decoder.embed(model, tokens_BT, mode), layers)
  last_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
  return decoder.logits(model, decoder.final(model, last_B1D))[:, 0], cache


def decode_step(model: Decoder, cache: Cache, token_B, position_B, mode: Mode = Mode()):
  """Runs one token per row, each at its own position, which must be below the cache's number of slots.

  Returns:
    (float32 logits_BV of the next token, the Cache with this one). Under jit the cache is updated in place where it is
    carried by a loop or donated.
  """
  tables = decoder.rope_at(model.spec, position_B)
  rows_B, slots_S = jnp.arange(position_B.shape[0]), jnp.arange(cache.k_LBSKH.shape[2])
  back_B11S = (position_B[:, None] - slots_S[None])[:, None, None]

  def layer(carry, scanned):
    x_1BD, cache = carry
    block, l, kind = scanned
    rope, window = decoder.rope_and_window(model.spec, tables, kind)
    seen_B11S = back_B11S >= 0 if window is None else (back_B11S >= 0) & (back_B11S < window)
    q_1BNH, *new = block.qkv(x_1BD, rope)
    cache = Cache(*(a_LBSKH.at[l, rows_B, position_B].set(a_1BKH[0]) for a_LBSKH, a_1BKH in zip(cache, new)))
    # Not model.attention: there is one query, and each row sees a number of keys of its own.
    attended_B1NH = decoder.masked_attention(
      q_1BNH.swapaxes(0, 1), cache.k_LBSKH[l], cache.v_LBSKH[l], seen_B11S, *model.spec.scores()
    )
    return (sharding.constrain_batch(_add(block, x_1BD, attended_B1NH.swapaxes(0, 1)), 1), cache), None

  # Attention apart, a block works token by token. So the batch lies on the axis of tokens, where the rotary tables have
  # a row for each: one row of B tokens instead of B rows of one.
  x_1BD = decoder.embed(model, token_B[None], mode, position_B, batch_axis=1)
  layers = model.layers, jnp.arange(model.num_layers), decoder.kinds(model.spec)
  (x_1BD, cache), _ = jax.lax.scan(layer, (x_1BD, cache), layers)
  return decoder.logits(model, decoder.final(model, x_1BD))[0], cache


def _add(block, x_BTD, attended_BTNH):
  """The stream after a layer, from what its attention gave."""
  attn_BTD, mlp_BTD = block.updates(x_BTD, attended_BTNH)
  return (x_BTD + attn_BTD) + mlp_BTD


def truncate(logits_BV, top_k: int, top_p: float):
  """−inf for tokens outside the top_k most probable, then outside the most probable that together reach top_p.

  What is as probable as the last token that is in is in, too; the most probable always is.
  """
  below = lambda logits_BV, least_B1: jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  if 0 < top_k < logits_BV.shape[-1]:
    logits_BV = below(logits_BV, jax.lax.top_k(logits_BV, top_k)[0][:, -1:])
  if top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    inside_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < top_p  # what is before a token does not reach top_p yet
    logits_BV = below(logits_BV, jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), -1, keepdims=True))
  return logits_BV


def sample(logits_BV, key_B, sampling: Sampling):
  """One token per row, int32; key_B is a random key per row, not read where the sampling is greedy."""
  if sampling.temperature < 1e-6:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  # The largest goes to 0 first: a low temperature must not lead to inf - inf.
  logits_BV = (logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / sampling.temperature
  logits_BV = truncate(logits_BV, sampling.top_k, sampling.top_p)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('capacity', 'room', 'sampling', 'mode'))
def run(model, tokens_BT, lengths_B, row_B, eos_E, limit, seed, *, capacity, room, sampling=Sampling(), mode=Mode()):
  """Prompts in, new tokens_BR out (END from the end of a sequence on; NOT_FINITE ends one, too), in one program.

  It stops with the last row.

  Args:
    tokens_BT, lengths_B, capacity, mode: as in `prefill`; capacity is at least the longest length + limit.
    row_B: int32, the number of a row for its random numbers; negative: the row is filling and gives nothing.
    eos_E: ids that end a sequence; may be empty.
    limit: largest number of new tokens, 1 to room.
    seed: a random key.
    room: R.
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


# ---- on the host ----


def generate(
  model: Decoder,
  prompts: list[list[int]],
  max_new_tokens: int,
  *,
  eos_ids: tuple[int, ...] = (),
  sampling: Sampling = Sampling(),
  seed: int = 0,
  mode: Mode = Mode(),
  batch_size: int = 16,
  capacity: int | None = None,
  put: Callable = jnp.asarray,
) -> list[list[int]]:
  """The new tokens after each prompt, at most max_new_tokens, up to and without the first of eos_ids.

  Sampled tokens depend on the seed, the prompt and its place in `prompts`; not on batch_size or on the other prompts.
  Gates are taken as 1.

  Args:
    prompts: token ids, at least one each.
    batch_size: prompts that are worked off side by side, those of similar length together.
    capacity: tokens that a prompt and what follows it may have together, such as the context the model was trained on;
      None: any number.
    put: brings a host array onto the devices (sharding.put_batch).

  Raises:
    InputError: a setting out of range, an empty prompt, a token that the model does not have, too little capacity, logits
      that are not finite.
  """
  _check_settings(sampling, seed, max_new_tokens=max_new_tokens, batch_size=batch_size)
  _check_prompts(prompts, model.spec.vocab_size, max_new_tokens, capacity)
  room, eos_E, key = _padded(max_new_tokens), np.array(eos_ids, np.int32), jax.random.key(seed)
  # No more rows than prompts, but as many as the devices divide.
  ways = sharding.batch_ways()
  batch_size, result = min(batch_size, -(-max(1, len(prompts)) // ways) * ways), [[]] * len(prompts)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for start in range(0, len(prompts), batch_size):
    numbers = order[start : start + batch_size]
    filling = batch_size - len(numbers)  # so that one program serves all batches of a length
    rows = [prompts[i] for i in numbers + numbers[:1] * filling]
    lengths_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((batch_size, _padded(lengths_B.max())), np.int32)
    for tokens_T, row in zip(tokens_BT, rows):
      tokens_T[: len(row)] = row
    row_B = np.array(numbers + [-1] * filling, np.int32)
    tokens_BR = run(
      model,
      put(tokens_BT),
      put(lengths_B),
      put(row_B),
      eos_E,
      np.int32(max_new_tokens),
      key,
      capacity=tokens_BT.shape[1] + room,
      room=room,
      sampling=sampling,
      mode=mode,
    )
    for i, new_R in zip(numbers, hosts.to_host(tokens_BR)):
      if NOT_FINITE in new_R:
        raise InputError(
          f"the model's logits are not finite at token {len(prompts[i]) + np.argmax(new_R == NOT_FINITE)} of prompt {i}; "
          'check its weights, or compute with --dtype=float32.'
        )
      result[i] = new_R[new_R != END].tolist()
  return result


def _padded(length: int) -> int:
  return -(-int(length) // PAD) * PAD


def _check_settings(sampling: Sampling, seed: int, **sizes: int):
  sampling.check()
  if not abs(seed) < 2**63:
    raise InputError(f'--seed={seed}: must be below 2^63.')
  for name, value in sizes.items():
    if not 1 <= value < 2**31:
      raise InputError(f'--{name}={value}: must be at least 1 and below 2^31.')


def _check_prompts(prompts, vocab_size: int, max_new_tokens: int, capacity: int | None):
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise InputError(f'prompt {i} has no tokens; give at least one.')
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
      wrong = next(token for token in prompt if not 0 <= token < vocab_size)
      raise InputError(f"prompt {i} has the token {wrong}, the model has {vocab_size}; use the model's own tokenizer.")
    if capacity is not None and len(prompt) + max_new_tokens > capacity:
      raise InputError(
        f'prompt {i} has {len(prompt)} tokens, with --max_new_tokens={max_new_tokens} more than the {capacity} positions '
        'that the model has; shorten it or ask for fewer.'
      )


def eos_ids(source: checkpoint_hf.Source) -> tuple[int, ...]:
  """The ids that end a sequence: those of generation_config.json, as in transformers, else of config.json."""
  path, found = source.files / 'generation_config.json', None
  if path.is_file():
    found = safetensors_files.read_json(path).get('eos_token_id')
  if found is None:
    found = source.config.get('eos_token_id')
  ids = found if isinstance(found, list) else [] if found is None else [found]
  if not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
    raise InputError(f'{source.files}: eos_token_id={found!r} must be a number or a list of them; mend the file.')
  return tuple(ids)


def continue_text(
  model: str,
  prompt: str,
  max_new_tokens: int = 64,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  dtype: str = 'float32',
  tokenizer: str = '',
) -> str:
  """What the command prints: the text after the prompt. `model` is a folder, a hub id or a .gguf file.

  Raises:
    InputError.
  """
  _check_settings(sampling, seed, max_new_tokens=max_new_tokens)
  with tempfile.TemporaryDirectory() as scratch:
    source = checkpoint_hf.open_source(model, pathlib.Path(scratch))
    tok = data.load_tokenizer(tokenizer or str(source.files))
    ends = eos_ids(source)
    tokens = tok(prompt, verbose=False)['input_ids']
    if not tokens:
      raise InputError('--prompt is missing or empty; give some text.')
    context = source.context_length
    _check_prompts([tokens], source.spec.vocab_size, max_new_tokens, context)  # before the weights are read
    new = generate(
      checkpoint_hf.load(source, dtype),
      [tokens],
      max_new_tokens,
      eos_ids=ends,
      sampling=sampling,
      seed=seed,
      mode=Mode(dtype=dtype),
      capacity=context,
    )[0]
  return tok.decode(new, skip_special_tokens=True)


# ---- the command ----


def define_flags():
  """Not at import: some have the names of flags of elder_jax.config."""
  kwargs = {'flag_values': flags.FLAGS, 'module_name': 'elder_jax'}
  flags.DEFINE_string('model', '', 'Model: a Hugging Face folder, an export, a hub id or a .gguf file.', **kwargs)
  flags.DEFINE_string('tokenizer', '', "Folder or hub id of the tokenizer, where it is not the model's own.", **kwargs)
  flags.DEFINE_string('prompt', '', 'Text to go on from, as it stands: no chat template.', **kwargs)
  flags.DEFINE_integer('max_new_tokens', 64, 'Largest number of new tokens.', **kwargs)
  flags.DEFINE_float('temperature', 0.0, 'Temperature of the sampling; 0: always the most probable token.', **kwargs)
  flags.DEFINE_integer('top_k', 0, 'Sample from the k most probable tokens; 0: from all.', **kwargs)
  flags.DEFINE_float('top_p', 1.0, 'Sample from the most probable tokens that together reach this.', **kwargs)
  flags.DEFINE_integer('seed', 0, 'Seed of the sampling.', **kwargs)
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of computation and of weights.', **kwargs)


def main(argv: list[str]):
  del argv
  f = flags.FLAGS
  sampling = Sampling(f.temperature, f.top_k, f.top_p)
  print(continue_text(f.model, f.prompt, f.max_new_tokens, sampling, f.seed, f.dtype, f.tokenizer))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
