"""Loads tokenizers, and reads evaluation texts: whole, tokenised, cut into windows."""

import dataclasses
import hashlib
import os

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.hf import folder as model_folder
from elder_jax.text import documents
from elder_jax.text import hub


def load_tokenizer(name: str):
  """The tokenizer of a Hugging Face folder or hub id. Never runs code from there.

  Raises:
    InputError: the folder or its tokenizer cannot be loaded.
  """
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # else it warns that PyTorch is missing, which is not needed
  import transformers  # not at the top: it takes seconds, and reading headers must not wait for it

  folder = model_folder.find('tokenizer', name, 'tokenizer')
  try:
    return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
  except Exception as e:  # many types, depending on what is wrong with the folder  # noqa: BLE001
    raise InputError(f'the tokenizer of {name} cannot be loaded ({reason(e)}); give one with --tokenizer.') from e


def read_text(flag: str, source: str, column: str) -> str:
  """The documents of a source (documents.Documents), joined by an empty line (the WikiText protocol), all in memory.

  Raises:
    InputError: the source cannot be read, is empty, or holds conversations.
  """
  if documents.list_files(flag, source, say=lambda _: None):
    found = [document for document, _ in documents.Documents(flag, source, column).read()]
    if any(not isinstance(document.content, str) for document in found):
      raise InputError(flag, source, 'holds conversations, which only --train_data reads; give a text.')
    text = ''.join(d.content + '\n\n' * d.ends for d in found)[:-2]
  else:
    text = '\n\n'.join(_hub_documents(flag, source, column))
  if not text:
    raise InputError(flag, source, 'is empty; give a file with text.')
  return text


def _hub_documents(flag: str, source: str, column: str) -> list[str]:
  """The documents of a hub data set. It is downloaded whole, so that a later run needs no network."""
  hub_id, configuration, split = hub.check_hub_id(flag, source)
  import datasets  # not at the top: it is slow to import, and an extra
  from datasets import exceptions

  datasets.disable_progress_bars()
  try:
    rows = datasets.load_dataset(hub_id, configuration or None, split=split)
    if column not in (names := rows.column_names):
      raise InputError(flag, source, f'has no column {column!r} but {names[:20]}; name it with --text_column.')
    texts = [text for text in rows[column] if text is not None]
  except InputError:
    raise
  except Exception as e:  # datasets raises many types; the data set cannot be read in any case  # noqa: BLE001
    why = e.__cause__ if isinstance(e, exceptions.DatasetGenerationError) and e.__cause__ else e
    raise InputError(
      flag, source, f'cannot be read ({reason(why)}); give a .txt, .jsonl or .parquet file or a hub id.'
    ) from e
  if not all(isinstance(text, str) for text in texts):
    raise InputError(flag, source, f'the column {column!r} holds no text; name another with --text_column.')
  return texts


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A tokenised text, with its source and checksum for the report."""

  source: str
  sha256: str  # of the text as UTF-8
  tokens_N: np.ndarray  # int32


def tokenise(flag: str, source: str, column: str, tokenizer, special_tokens: bool = True) -> Corpus:
  """Reads and tokenises a text. special_tokens: the tokenizer adds its special tokens. Raises InputError."""
  text = read_text(flag, source, column)
  tokens = tokenizer(text, add_special_tokens=special_tokens, verbose=False)['input_ids']
  return Corpus(source, hashlib.sha256(text.encode()).hexdigest(), np.array(tokens, np.int32))


def bos_rule(bos: str, bos_first: bool, tokenizer) -> tuple[str, int | None]:
  """Resolves --bos for a model. Returns (tokenizer, window or none; the token that each window starts with or None).

  Args:
    bos: tokenizer, window, none, or auto (window for families that need it, tokenizer for others).
    bos_first: the model's family needs a BOS token at the start of each window.

  Raises:
    InputError: window, but the tokenizer has no BOS token.
  """
  if bos == 'auto':
    bos = 'window' if bos_first else 'tokenizer'
  if bos == 'window' and tokenizer.bos_token_id is None:
    raise InputError('bos', 'window', 'the tokenizer has no begin-of-sequence token; use --bos=tokenizer.')
  return bos, tokenizer.bos_token_id if bos == 'window' else None


def windows(tokens_N: np.ndarray, length: int, first: int | None) -> np.ndarray:
  """Consecutive windows [N, length]; the remainder is dropped. first: the token that each starts with, or None."""
  text_len = length - (first is not None)
  count = len(tokens_N) // text_len
  rows_NT = tokens_N[: count * text_len].reshape(count, text_len)
  return rows_NT if first is None else np.concatenate([np.full((count, 1), first, np.int32), rows_NT], 1)
