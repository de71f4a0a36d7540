"""Renders conversations with the tokenizer's chat template and marks the tokens that the assistant wrote."""

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.text.documents import Message


class Refused(InputError):
  """The template refuses one conversation; others may be valid."""


def check(flag: str, source: str, tokenizer):
  """Raises InputError for a tokenizer that cannot render conversations."""
  if not getattr(tokenizer, 'chat_template', None):
    raise InputError(
      flag,
      source,
      'holds conversations, but the tokenizer has no chat template; give one that has it with --tokenizer.',
    )
  if not getattr(tokenizer, 'is_fast', False):
    raise InputError(flag, source, 'holds conversations; they need a tokenizer with a tokenizer.json (a fast one).')


def tokens_of(flag: str, source: str, tokenizer, messages: list[Message]) -> list[int]:
  """The tokens of a conversation. Raises Refused if the template refuses it."""
  whole = _render(flag, source, tokenizer, messages)
  return tokenizer(whole, add_special_tokens=False, verbose=False)['input_ids']


def encode(flag: str, source: str, tokenizer, messages: list[Message]) -> tuple[list[int], np.ndarray]:
  """The tokens of a conversation, and a bool array [T]: whether the assistant wrote each token.

  An assistant's turn is the text after the generation prompt. It includes the end-of-turn token, but not the white
  space after it.

  Raises:
    Refused: the template refuses the conversation.
    InputError: the template renders an earlier turn differently once later turns follow.
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
          "the chat template renders earlier turns differently once later ones follow, so the assistant's tokens cannot "
          'be identified; use --train_on=all.',
        )
      own_N |= (begin_N < len(after)) & (end_N > len(before))
  return encoded['input_ids'], own_N


def _render(flag: str, source: str, tokenizer, messages: list[Message], ask: bool = False) -> str:
  """The conversation as text; ask: with the generation prompt at the end."""
  try:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
  except Exception as e:  # a template is a program  # noqa: BLE001
    why = f'the chat template refuses a conversation ({reason(e)}); leave that row out.'
    raise Refused(flag, source, why) from e
