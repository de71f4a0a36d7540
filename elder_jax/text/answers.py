"""What a model writes after a few fixed prompts: perplexity does not show that it forgot the capital of France."""

from collections.abc import Callable
import json

import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.text.generation import generate

NONE = 'none'  # of --prompts
# A fact about the world, one about nature, prose, code, arithmetic.
PROMPTS = (
  'The capital of France is',
  'Water is made of hydrogen and',
  'Once upon a time, there was a',
  'def factorial(n):',
  'Question: What is 7 times 8?\nAnswer:',
)


def read_prompts(name: str) -> list[str]:
  """The prompts of --prompts: those of a file, or PROMPTS if it is empty.

  Args:
    name: a text file with a prompt on each line, or a .jsonl file with an object with "prompt" on each line. Empty lines
      are skipped.

  Raises:
    InputError.
  """
  if not name:
    return list(PROMPTS)
  path = user_path(name)
  try:
    lines = path.read_text(encoding='utf-8-sig').splitlines()
  except (OSError, UnicodeDecodeError) as e:
    why = e.strerror if isinstance(e, OSError) else 'it is not UTF-8'
    raise InputError('prompts', name, f'cannot be read ({why}); give a text file with a prompt on each line.') from e
  lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
  if not lines:
    raise InputError('prompts', name, f'has no prompts; give some, or --prompts={NONE}.')
  if path.suffix != '.jsonl':
    return [line for _, line in lines]
  return [_of_json(name, number, line) for number, line in lines]


def _of_json(name: str, number: int, line: str) -> str:
  try:
    prompt = json.loads(line)['prompt']
  except (ValueError, TypeError, KeyError, RecursionError):
    prompt = None
  if not (isinstance(prompt, str) and prompt):
    raise InputError('prompts', name, f'line {number} is not a JSON object with a text "prompt"; correct it.')
  return prompt


def encode(prompts: list[str], tokenizer, first: int | None) -> list[list[int]]:
  """The tokens of each prompt.

  Args:
    first: a token that every prompt must begin with (data.bos_rule); None: whatever the tokenizer makes.
  """
  rows = [list(tokenizer(prompt, verbose=False)['input_ids']) for prompt in prompts]
  return [row if first is None or row[:1] == [first] else [first, *row] for row in rows]


def why_not(rows: list[list[int]], new_tokens: int, vocab_size: int, context: int | None) -> str:
  """Why a model cannot answer these prompts; empty if it can.

  Args:
    context: the positions that the model has; None: any number.
  """
  if not all(rows):
    return 'the tokenizer makes no tokens of a prompt'
  if (largest := max(map(max, rows))) >= vocab_size:
    return f'the tokenizer makes the token {largest}, the model has {vocab_size}'
  if context is not None and (length := max(map(len, rows)) + new_tokens) > context:
    return f'with --answer_tokens={new_tokens} a prompt takes {length} positions, the model has {context}'
  return ''


def answer(
  model: Decoder,
  tokenizer,
  rows: list[list[int]],
  new_tokens: int,
  eos_ids: tuple[int, ...] = (),
  mode: Mode = Mode(),
  put: Callable = jnp.asarray,
) -> list[str]:
  """What the model writes after each prompt: the most probable tokens, at most new_tokens.

  Args:
    rows: of `encode`; batches have 16 of them, so that one program serves all.
    put: puts a host array onto the devices (sharding.put_batch).

  Raises:
    InputError: the logits are not finite.
  """
  ways = sharding.batch_ways()
  batch_size = -(-16 // ways) * ways
  tokens = generate(model, rows, new_tokens, eos_ids=eos_ids, mode=mode, batch_size=batch_size, put=put)
  return [tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def pairs(prompts: list[str], dense: list[str] | None, pruned: list[str] | None) -> list[dict]:
  """[{'prompt', 'dense', 'pruned'}] of report.json; an answer is None if a model gave none."""
  if not (dense or pruned):
    return []
  none = [None] * len(prompts)
  return [dict(zip(('prompt', 'dense', 'pruned'), row)) for row in zip(prompts, dense or none, pruned or none)]
