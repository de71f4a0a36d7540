"""Conversations as tokens, by the tokenizer's own chat template, and which of them the assistant wrote."""

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.text.documents import Message


class Refused(InputError):
  """The template refuses one conversation; others may be fine."""


def check(flag: str, source: str, tokenizer):
  """Raises InputError for a tokenizer that cannot render conversations."""
  if not getattr(tokenizer, 'chat_template', None):
    raise InputError(
      flag, source, 'holds conversations, but the tokenizer has no chat template; give one that has, by --tokenizer.'
    )
  if not getattr(tokenizer, 'is_fast', False):
    raise InputError(flag, source, 'holds conversations; they need a tokenizer with a tokenizer.json (a fast one).')


def tokens_of(flag: str, source: str, tokenizer, messages: list[Message]) -> list[int]:
  """The tokens of a conversation. Raises InputError."""
  whole = _render(flag, source, tokenizer, messages)
  return tokenizer(whole, add_special_tokens=False, verbose=False)['input_ids']


def encode(flag: str, source: str, tokenizer, messages: list[Message]) -> tuple[list[int], np.ndarray]:
  """The tokens of a conversation, and for each whether the assistant wrote it.

  The assistant's is what the template adds to a conversation that ends where the assistant is asked to speak, the end of
  its turn included, the white space after that not.

  Raises:
    InputError: the template refuses the conversation, or shows earlier turns otherwise once there are later ones.
  """
  whole = _render(flag, source, tokenizer, messages)
  encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
  begin_N, end_N = np.array(encoded['offset_mapping'], np.int64).reshape(-1, 2).T
  own_N = np.zeros(len(begin_N), bool)
  for i, message in enumerate(messages):
    if message['role'] == 'assistant':
      before = _render(flag, source, tokenizer, messages[:i], ask=True)
      after = _render(flag, source, tokenizer, messages[: i + 1]).rstrip()
      if not (whole.startswith(after) and after.startswith(before)):
        raise InputError(
          flag,
          source,
          "the chat template shows earlier turns otherwise once later ones follow, so that the assistant's cannot be "
          'told; use --train_on=all.',
        )
      own_N |= (begin_N < len(after)) & (end_N > len(before))
  return encoded['input_ids'], own_N


def _render(flag: str, source: str, tokenizer, messages: list[Message], ask: bool = False) -> str:
  """ask: the assistant is asked to speak."""
  try:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
  except Exception as e:  # a template is a program  # noqa: BLE001
    why = f'the chat template refuses a conversation ({reason(e)}); leave that row out.'
    raise Refused(flag, source, why) from e
