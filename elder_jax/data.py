"""Text in: read, tokenised once, packed to [N, T]. A batch is a pure function of (seed, step)."""

import dataclasses
import hashlib
import os

import numpy as np

from elder_jax import model_folder
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path

_BUILDERS = {'.jsonl': 'json', '.json': 'json', '.parquet': 'parquet'}


def load_tokenizer(name: str):
  """The tokenizer of a Hugging Face folder or hub id. Runs no code from there."""
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')  # else it calls for PyTorch, which nothing here needs
  import transformers  # here: it takes seconds, and reading headers shall not wait for it

  folder = model_folder.find('--tokenizer', name, 'tokenizer')
  try:
    return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
  except Exception as e:  # it raises many kinds for a bad folder  # noqa: BLE001
    raise InputError(f'the tokenizer of {name} cannot be loaded ({reason(e)}); give one with --tokenizer.') from e


def read_text(flag: str, source: str, column: str) -> str:
  """The documents of a local file or hub data set, joined by an empty line (the WikiText protocol).

  Args:
    flag: what to name in an error, e.g. --train_data.
    source: path of a .txt (one document), .jsonl or .parquet file, or a hub id as id[:configuration][:split].
  """
  import datasets  # here, as above

  datasets.disable_progress_bars()
  path = user_path(source)
  try:
    if path.suffix == '.txt' or path.suffix in _BUILDERS:
      if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long or not to be reached
        raise InputError(f'{flag}={source}: there is no such file; check the path.')
      if not path.stat().st_size:
        raise InputError(f'{flag}={source}: is empty; give a file with text.')
      if path.suffix == '.txt':  # datasets' reader makes every line's end a \n
        return path.read_bytes().decode()
      rows = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path.resolve()), split='train')
    elif os.path.isfile(path):
      raise InputError(f'{flag}={source}: is of no kind that can be read; give a .txt, .jsonl or .parquet file.')
    else:
      hub_id, *rest = source.split(':', 2)
      split = rest.pop() if rest else 'train'
      rows = datasets.load_dataset(hub_id, *rest, split=split)
  except InputError:
    raise
  except Exception as e:  # datasets raises many kinds, all mean the same here  # noqa: BLE001
    why = e.__cause__ if isinstance(e, datasets.exceptions.DatasetGenerationError) and e.__cause__ else e
    raise InputError(
      f'{flag}={source}: cannot be read ({reason(why)}); give a .txt, .jsonl or .parquet file or a hub id.'
    ) from e
  if column not in rows.column_names:
    raise InputError(f'{flag}={source}: has no column {column!r} but {rows.column_names}; name it with --text_column.')
  texts = [text for text in rows[column] if text is not None]
  if not all(isinstance(text, str) for text in texts):
    raise InputError(f'{flag}={source}: the column {column!r} holds no text; name another with --text_column.')
  return '\n\n'.join(texts)


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
      f'{flag}={corpus.source}: has {len(corpus.tokens_N)} tokens, --num_sequences={num_sequences} of '
      f'--seq_len={seq_len} need {num_sequences * (seq_len - (first is not None))}; give a longer text or ask for fewer.'
    )
  if seed is None:
    return rows_NT[:num_sequences]
  return rows_NT[np.sort(np.random.default_rng(seed).choice(available, num_sequences, replace=False))]


def batch(rows_NT: np.ndarray, batch_size: int, step: int, seed: int | None) -> np.ndarray:
  """The [B, T] batch of a step, passes without end; `seed` None keeps the order of the rows. Pure: resume is the step."""
  per_pass = len(rows_NT) // batch_size
  epoch, i = divmod(step, per_pass)
  order_N = np.arange(len(rows_NT)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(rows_NT))
  return rows_NT[order_N[i * batch_size : (i + 1) * batch_size]]
