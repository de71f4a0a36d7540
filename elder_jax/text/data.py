"""Text in: read, tokenised once, packed to [N, T]."""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import folder as model_folder
from elder_jax.log import log

_KINDS = ('.txt', '.jsonl', '.json', '.parquet')
_MAGIC = {  # how files of other kinds begin, whatever they are called
  b'\x1f\x8b': 'compressed by gzip',
  b'BZh': 'compressed by bzip2',
  b'\xfd7zXZ\0': 'compressed by xz',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd',
  b'PK\x03\x04': 'a zip archive',
  b'PAR1': 'a Parquet file',
  b'%PDF-': 'a PDF',
  b'\xff\xfe\0\0': 'UTF-32',
  b'\xff\xfe': 'UTF-16',
  b'\xfe\xff': 'UTF-16',
}


def load_tokenizer(name: str):
  """The tokenizer of a Hugging Face folder or hub id. Runs no code from there."""
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # else it calls for PyTorch, which nothing here needs
  import transformers  # here: it takes seconds, and reading headers shall not wait for it

  folder = model_folder.find('tokenizer', name, 'tokenizer')
  try:
    return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
  except Exception as e:  # it raises many kinds for a bad folder  # noqa: BLE001
    raise InputError(f'the tokenizer of {name} cannot be loaded ({reason(e)}); give one with --tokenizer.') from e


def read_text(flag: str, source: str, column: str) -> str:
  """The documents of a local file, folder or hub data set, joined by an empty line (the WikiText protocol).

  A path is opened as it is: `datasets` would take brackets, stars and colons in it for a pattern.

  Args:
    flag: what to name in an error, e.g. --train_data.
    source: path of a .txt (one document), .jsonl, .json or .parquet file or of a folder of such files, all of one kind,
      or a hub id as id[:configuration][:split].
  """
  path = user_path(source)
  if source and os.path.isdir(path):
    documents = [text for file in _files(flag, source, path) for text in _documents(flag, str(file), file, column)]
  elif os.path.isfile(path):  # unlike Path.is_file, False for a name too long or not to be reached
    documents = _documents(flag, source, path, column)
  elif path.suffix.lower() in _KINDS:
    raise InputError(flag, source, 'there is no such file; check the path.')
  else:
    documents = _hub_documents(flag, source, column)
  text = '\n\n'.join(documents)
  if not text:
    raise InputError(flag, source, 'is empty; give a file with text.')
  try:
    text.encode()
  except UnicodeEncodeError as e:  # JSON can hold it
    raise InputError(flag, source, 'holds half of a surrogate pair, which is no character; remove it.') from e
  return text


def _files(flag: str, source: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder, sorted by name; hidden ones do not count."""
  try:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
  except OSError as e:
    raise InputError(flag, source, f'cannot be read ({reason(e)}); check its permissions.') from e
  found = sorted({'folders' if p.is_dir() else p.suffix.lower() or 'files without a suffix' for p in files})
  if len(found) != 1 or found[0] not in _KINDS:
    raise InputError(
      flag,
      source,
      f'a folder must hold .txt, .jsonl, .json or .parquet files, all of one kind, this one holds '
      f'{", ".join(found[:8]) or "no files"}; give a folder of one kind, or a file.',
    )
  log(f'{flag}={source}: reading {len(files)} {found[0]} files, {files[0].name} to {files[-1].name}')
  return files


def _documents(flag: str, source: str, path: pathlib.Path, column: str) -> list[str]:
  """The documents of one file."""
  kind = path.suffix.lower()
  try:
    with path.open('rb') as file:
      head = file.read(1024)
    if not head:
      return []
    what = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if kind == '.parquet' and what in (None, _MAGIC[b'PAR1']):
      import pyarrow.parquet  # here, as above

      with path.open('rb') as file:
        table = pyarrow.parquet.ParquetFile(file)
        return _texts(flag, source, column, table.schema_arrow.names, lambda: table.read([column])[column].to_pylist())
    if what is None and kind in _KINDS and b'\0' in head:
      what = 'binary data or UTF-16'
    if what:
      raise InputError(flag, source, f'is {what}; give UTF-8 text as .txt or .jsonl, or Parquet as .parquet.')
    if kind not in _KINDS:
      raise InputError(flag, source, 'is of no kind that can be read; give a .txt, .jsonl or .parquet file.')
    text = path.read_bytes().decode('utf-8-sig')  # -sig: without the byte order mark that some editors write
    if kind == '.txt':
      return [text]
    rows = _json_rows(text)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _texts(flag, source, column, names, lambda: [row.get(column) for row in rows])
  except InputError:
    raise
  except Exception as e:  # of a damaged file any kind  # noqa: BLE001
    raise InputError(flag, source, f'cannot be read ({reason(e)}); give a .txt, .jsonl or .parquet file.') from e


def _json_rows(text: str) -> list[dict]:
  """The objects of one JSON array, or of a line each."""
  if text.lstrip().startswith('['):
    rows = json.loads(text)
  else:
    rows = []
    for number, line in enumerate(text.split('\n'), 1):  # splitlines would cut at U+2028 inside a text
      try:
        rows += [json.loads(line)] if line.strip() else []
      except ValueError as e:
        raise ValueError(f'line {number}: {e}') from e
  if not all(isinstance(row, dict) for row in rows):
    raise ValueError('a row is no JSON object such as {"text": "…"}')
  return rows


def _hub_documents(flag: str, source: str, column: str) -> list[str]:
  import datasets  # here, as above
  from datasets import exceptions
  from datasets import packaged_modules

  hub_id, *rest = source.split(':', 2)
  # `datasets` takes other names for URLs, patterns, local folders, or its own readers, which read the current folder.
  is_id = re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', hub_id) and not os.path.exists(hub_id)
  if not is_id or hub_id in packaged_modules._PACKAGED_DATASETS_MODULES:
    raise InputError(
      flag,
      source,
      'is no file or folder here and no id of a hub data set; give a .txt, .jsonl or .parquet file, a '
      'folder of them, or a hub id as owner/name.',
    )
  datasets.disable_progress_bars()
  try:
    rows = datasets.load_dataset(hub_id, *rest[:-1], split=rest[-1] if rest else 'train')
    return _texts(flag, source, column, rows.column_names, lambda: rows[column])
  except InputError:
    raise
  except Exception as e:  # datasets raises many kinds, all mean the same here  # noqa: BLE001
    why = e.__cause__ if isinstance(e, exceptions.DatasetGenerationError) and e.__cause__ else e
    raise InputError(
      flag, source, f'cannot be read ({reason(why)}); give a .txt, .jsonl or .parquet file or a hub id.'
    ) from e


def _texts(flag: str, source: str, column: str, names: list[str], values: Callable[[], list]) -> list[str]:
  """The values of a column; a row without one has no text."""
  if column not in names:
    raise InputError(flag, source, f'has no column {column!r} but {names[:20]}; name it with --text_column.')
  texts = [text for text in values() if text is not None]
  if not all(isinstance(text, str) for text in texts):
    raise InputError(flag, source, f'the column {column!r} holds no text; name another with --text_column.')
  return texts


@dataclasses.dataclass(frozen=True)
class Corpus:
  """A tokenised text, and what a reader needs to know which one it was."""

  source: str
  sha256: str  # of the text as UTF-8
  tokens_N: np.ndarray  # int32


def tokenise(flag: str, source: str, column: str, tokenizer, special_tokens: bool = True) -> Corpus:
  """Reads and tokenises a text; with `special_tokens` the tokenizer adds what it adds by its own rule."""
  text = read_text(flag, source, column)
  tokens = tokenizer(text, add_special_tokens=special_tokens, verbose=False)['input_ids']
  return Corpus(source, hashlib.sha256(text.encode()).hexdigest(), np.array(tokens, np.int32))


def bos_rule(bos: str, bos_first: bool, tokenizer) -> tuple[str, int | None]:
  """(--bos as it is meant for a model, the token that each window begins with or None).

  Args:
    bos: tokenizer, window, none, or auto: window for families that need it, tokenizer for others.
    bos_first: the model's family needs it.
  """
  if bos == 'auto':
    bos = 'window' if bos_first else 'tokenizer'
  if bos == 'window' and tokenizer.bos_token_id is None:
    raise InputError('bos', 'window', 'the tokenizer has no begin-of-sequence token; use --bos=tokenizer.')
  return bos, tokenizer.bos_token_id if bos == 'window' else None


def windows(tokens_N: np.ndarray, length: int, first: int | None) -> np.ndarray:
  """[N, length] windows that follow each other, the rest dropped; `first`: the token that each begins with, or None."""
  text_len = length - (first is not None)
  count = len(tokens_N) // text_len
  rows_NT = tokens_N[: count * text_len].reshape(count, text_len)
  return rows_NT if first is None else np.concatenate([np.full((count, 1), first, np.int32), rows_NT], 1)


def pack(
  corpus: Corpus, flag: str, seq_len: int, num_sequences: int, seed: int | None, first: int | None = None
) -> np.ndarray:
  """num_sequences `windows` of seq_len tokens: drawn with `seed` from all that the text has, or its first (None)."""
  rows_NT = windows(corpus.tokens_N, seq_len, first)
  available = len(rows_NT)
  if available < num_sequences:
    raise InputError(
      flag,
      corpus.source,
      f'has {len(corpus.tokens_N)} tokens, --num_sequences={num_sequences} of '
      f'--seq_len={seq_len} need {num_sequences * (seq_len - (first is not None))}; give a longer text or ask for fewer.',
    )
  if seed is None:
    return rows_NT[:num_sequences]
  return rows_NT[np.sort(np.random.default_rng(seed).choice(available, num_sequences, replace=False))]
