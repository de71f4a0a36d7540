"""Generation, greedy or sampled: batches of prompts of different lengths, or one prompt token by token."""

from collections.abc import Callable
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf import safetensors_files
from elder_jax.hf.source import Source
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.text.decoding import END
from elder_jax.text.decoding import NOT_FINITE
from elder_jax.text.decoding import PAD
from elder_jax.text.decoding import Sampling
from elder_jax.text.decoding import decode_step
from elder_jax.text.decoding import prefill
from elder_jax.text.decoding import run_prompts
from elder_jax.text.decoding import sample


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
  """The new tokens after each prompt, at most max_new_tokens. The first of eos_ids ends a row and is not returned.

  Sampled tokens depend on the seed, the prompt and its index in `prompts`, not on batch_size or the other prompts.
  Gates are 1.

  Args:
    prompts: token ids, at least one each.
    batch_size: prompts per batch; prompts of similar length share a batch.
    capacity: largest number of tokens of a prompt and its continuation together, such as the model's context; None: no
      limit.
    put: moves a host array to the devices (sharding.put_batch).

  Raises:
    InputError: a setting is out of range, a prompt is empty, a token is not in the model's vocabulary, the capacity is
      too small, or the logits are not finite.
  """
  check_settings(sampling, seed, max_new_tokens=max_new_tokens, batch_size=batch_size)
  check_prompts(prompts, model.spec.vocab_size, max_new_tokens, capacity)
  room, eos_E, key = padded(max_new_tokens), np.array(eos_ids, np.int32), jax.random.key(seed)
  # At most one row per prompt, rounded up to a multiple that the devices divide.
  ways = sharding.batch_ways()
  batch_size, result = min(batch_size, -(-max(1, len(prompts)) // ways) * ways), [[]] * len(prompts)
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  for start in range(0, len(prompts), batch_size):
    numbers = order[start : start + batch_size]
    arrays = _batch(prompts, numbers, batch_size)
    tokens_BR = run_prompts(
      model,
      *map(put, arrays),
      eos_E,
      np.int32(max_new_tokens),
      key,
      capacity=arrays[0].shape[1] + room,
      room=room,
      sampling=sampling,
      mode=mode,
    )
    for i, new_R in zip(numbers, hosts.to_host(tokens_BR)):
      if NOT_FINITE in new_R:
        raise InputError(
          f"the model's logits are not finite at token {len(prompts[i]) + np.argmax(new_R == NOT_FINITE)} of prompt {i}; "
          'check the weights, or use --dtype=float32.'
        )
      result[i] = new_R[new_R != END].tolist()
  return result


def _batch(prompts: list[list[int]], numbers: list[int], batch_size: int):
  """(tokens_BT, lengths_B, row_B) of run_prompts for the prompts with the indices `numbers`."""
  filling = batch_size - len(numbers)  # padding rows, so that one program serves all batches of a length
  rows = [prompts[i] for i in numbers + numbers[:1] * filling]
  lengths_B = np.array([len(row) for row in rows], np.int32)
  tokens_BT = np.zeros((batch_size, padded(lengths_B.max())), np.int32)
  for tokens_T, row in zip(tokens_BT, rows):
    tokens_T[: len(row)] = row
  return tokens_BT, lengths_B, np.array(numbers + [-1] * filling, np.int32)


def padded(length: int) -> int:
  return -(-int(length) // PAD) * PAD


def check_settings(sampling: Sampling, seed: int, **sizes: int):
  sampling.check()
  if not abs(seed) < 2**63:
    raise InputError('seed', seed, 'must be below 2^63.')
  for name, value in sizes.items():
    if not 1 <= value < 2**31:
      raise InputError(name, value, 'must be at least 1 and below 2^31.')


def check_prompts(prompts, vocab_size: int, max_new_tokens: int, capacity: int | None):
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise InputError(f'prompt {i} has no tokens; give at least one.')
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
      wrong = next(token for token in prompt if not 0 <= token < vocab_size)
      raise InputError(
        f"prompt {i} has the token {wrong}, but the model has {vocab_size} tokens; use the model's own tokenizer."
      )
    if capacity is not None and len(prompt) + max_new_tokens > capacity:
      raise InputError(
        f"prompt {i} has {len(prompt)} tokens, which with --max_new_tokens={max_new_tokens} exceeds the model's {capacity} "
        'positions; shorten the prompt or lower --max_new_tokens.'
      )


def eos_ids(source: Source) -> tuple[int, ...]:
  """The ids that end a sequence: from generation_config.json, as in transformers, else from config.json.

  Raises:
    InputError: eos_token_id is not a number or a list of numbers.
  """
  path, found = source.files / 'generation_config.json', None
  if path.is_file():
    found = safetensors_files.read_json(path).get('eos_token_id')
  if found is None:
    found = source.config.get('eos_token_id')
  ids = found if isinstance(found, list) else [] if found is None else [found]
  if not all(isinstance(i, int) and abs(i) < 2**31 for i in ids):
    raise InputError(f'{source.files}: eos_token_id={found!r} must be a number or a list of numbers; correct the file.')
  return tuple(ids)


def stream(
  model: Decoder,
  prompt: list[int],
  max_new_tokens: int,
  *,
  eos_ids: tuple[int, ...] = (),
  sampling: Sampling = Sampling(),
  seed: int = 0,
  mode: Mode = Mode(),
  capacity: int | None = None,
) -> Iterator[int]:
  """Yields the tokens that `generate` returns for one prompt, as they are generated. Arguments and errors as there."""
  check_settings(sampling, seed, max_new_tokens=max_new_tokens)
  check_prompts([prompt], model.spec.vocab_size, max_new_tokens, capacity)
  tokens_BT = np.zeros((1, padded(len(prompt))), np.int32)
  tokens_BT[0, : len(prompt)] = prompt
  slots = tokens_BT.shape[1] + padded(max_new_tokens)
  key = jax.random.fold_in(jax.random.key(seed), 0)
  logits_BV, cache = _prefill(model, tokens_BT, np.array([len(prompt)], np.int32), capacity=slots, mode=mode)
  for n in range(max_new_tokens):
    if not np.isfinite(logits_BV).all():
      raise InputError("the model's logits are not finite; check the weights, or use --dtype=float32.")
    token_B = sample(logits_BV, jax.random.fold_in(key, n)[None], sampling)
    token = int(token_B[0])
    if token in eos_ids:
      return
    yield token
    logits_BV, cache = _decode_step(model, cache, token_B, np.array([len(prompt) + n], np.int32), mode=mode)


_prefill = jax.jit(prefill, static_argnames=('capacity', 'mode'))
_decode_step = jax.jit(decode_step, static_argnames='mode', donate_argnums=1)
