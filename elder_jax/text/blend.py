"""The rows of tokens that a run trains on: several sources, mixed by weight and read on demand.

Row n depends on the settings and the texts only, not on the number of hosts or on where a run was resumed.
"""

from collections.abc import Sequence
import dataclasses
import os
import re

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.text.token_store import TokenStore


@dataclasses.dataclass(frozen=True)
class Part:
  """A source of a blend: the entry [name=]source[@weight] as given, its parts, and the setting that holds it."""

  setting: str
  given: str
  name: str
  source: str
  weight: float


def parts_of(entries: Sequence[str], setting: str) -> list[Part]:
  """The sources of --train_data, with weights that sum to 1.

  Raises:
    InputError: a name is given twice, or all weights are 0.
  """
  parts = [_part(entry, setting) for entry in entries]
  for part in parts:
    if [p.name for p in parts].count(part.name) > 1:
      raise InputError(setting, part.given, f'the name {part.name!r} is given twice; name each source once.')
  total = sum(part.weight for part in parts)
  if total <= 0:
    raise InputError(setting, ','.join(entries), 'the weights sum to 0; give at least one source a weight above 0.')
  return [dataclasses.replace(part, weight=part.weight / total) for part in parts]


def _part(entry: str, setting: str) -> Part:
  """Parses one entry. If a file with the name of the whole entry exists, the entry has no weight and no name."""
  name, source, weight = entry, entry, 1.0
  if not _exists(source) and (match := re.fullmatch(r'(.+)@(\d+\.?\d*|\.\d+)', source, re.DOTALL)):
    name = source = match[1]
    weight = float(match[2])
  if not _exists(source) and (match := re.fullmatch(r'([\w.-]+)=(.+)', source, re.DOTALL)):
    name, source = match[1], match[2]
  return Part(setting, entry, name, source, weight)


def _exists(name: str) -> bool:
  return os.path.exists(user_path(name))


@dataclasses.dataclass(frozen=True)
class Window:
  """Cuts a stream of tokens into consecutive rows of `length` tokens, each starting with `first` unless it is None."""

  length: int
  first: int | None = None

  @property
  def text_len(self) -> int:
    return self.length - (self.first is not None)


class Source:
  """The rows of one source: held-out rows and training rows."""

  def __init__(self, part: Part, store: TokenStore, window: Window, masked: bool):
    """masked: the source holds conversations in which only some tokens count in the loss."""
    self.part, self.masked, self._store, self._window = part, masked, store, window
    self._held, self._drawn, self.needed, self._orders = np.arange(0), None, 0, {}

  def num_rows(self, most: int | None = None) -> int:
    """Counts rows up to `most`. None counts all rows, which reads the source to its end."""
    width = self._window.text_len
    return self._store.count(None if most is None else most * width) // width

  @property
  def num_tokens(self) -> int | None:
    """Tokens of the whole source; None if its end has not been reached."""
    return self._store.count() if self._store.whole else None

  def draw(self, needed: int, held: int, seed: int | None, whole: bool):
    """Selects the held-out rows and the first `needed` training rows.

    Args:
      needed: number of training rows.
      held: number of held-out rows.
      seed: seed of the random draw; None keeps the rows in text order.
      whole: draw from the whole source. Otherwise take rows in text order, the held-out ones first.
    """
    self.needed, self._seed = needed, seed
    if not (whole and seed is not None):
      self._held = np.arange(held)
      return
    rest = np.arange(self.num_rows())
    if held:
      self._held = np.sort(np.random.default_rng((seed, 1)).choice(len(rest), min(held, len(rest)), replace=False))
      rest = np.setdiff1d(rest, self._held)
    if needed < len(rest):
      rest = rest[np.sort(np.random.default_rng(seed).choice(len(rest), needed, replace=False))]
    self._drawn = rest

  @property
  def available(self) -> int | None:
    """Training rows before they repeat; None if the end of the source has not been reached."""
    if self._drawn is not None:
      return len(self._drawn)
    return self.num_rows() - len(self._held) if self._store.whole else None

  def held_out(self, j: int) -> int:
    """The index in the stream of held-out row j."""
    return int(self._held[j])

  def number(self, j: int) -> int:
    """The index in the stream of training row j. After the last row, the source starts again.

    Raises:
      InputError: the source has no training rows.
    """
    if self._drawn is None:
      held = len(self._held)
      if self.num_rows(held + j + 1) > held + j:
        return held + j
      if self.available <= 0:
        raise InputError(self.part.setting, self.part.given, self.too_short('a sequence', held + 1))
      return held + j % self.available
    a_pass, i = divmod(j, len(self._drawn))
    return int(self._drawn[i if not a_pass else self._order(a_pass)[i]])

  def _order(self, a_pass: int) -> np.ndarray:
    if a_pass not in self._orders:
      self._orders = {a_pass: np.random.default_rng((self._seed, a_pass)).permutation(len(self._drawn))}
    return self._orders[a_pass]

  def too_short(self, wanted: str, rows: int) -> str:
    """The reason of the InputError for a source with too few rows."""
    window = self._window
    return (
      f'has {self._store.count()} tokens, {wanted} of --seq_len={window.length} need {rows * window.text_len}; give a '
      'longer text or request fewer sequences.'
    )

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A row of the stream: its tokens [T] int32, and which of them count in the loss [T] bool.

    Raises:
      InputError: the source starts with texts and has conversations later.
    """
    window = self._window
    tokens_T, counted_T = self._store.read(number * window.text_len, window.text_len)
    if not self.masked and not counted_T.all():
      raise InputError(
        self.part.setting, self.part.given, 'has conversations after texts; make them a separate source.'
      )
    if window.first is not None:
      tokens_T, counted_T = np.append(np.int32(window.first), tokens_T), np.append(False, counted_T)
    return tokens_T, counted_T


class Rows:
  """Rows [T] of all sources; `rows[numbers]` is [n, T].

  Sources are interleaved, so that their weights hold in every part of a run.
  """

  def __init__(self, sources: list[Source], counts: list[int], held_out: bool = False, vocab_size: int | None = None):
    """Interleaves the rows of all sources.

    Args:
      counts: rows of each source.
      held_out: read the held-out rows, not the training rows.
      vocab_size: vocabulary size of the model; every token id must be below it. None: no check.
    """
    self.sources, self._held_out, self._vocab_size = sources, held_out, vocab_size
    self.masked = any(source.masked for source in sources)
    turn = np.concatenate([(np.arange(count) + 0.5) / max(1, count) for count in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((source, turn))
    self._source_N, self._number_N = source[order], number[order]

  def __len__(self) -> int:
    return len(self._source_N)

  def __getitem__(self, numbers: Sequence[int]) -> np.ndarray:
    """Tokens [n, T], int32. Raises InputError for a row that cannot be read or a token outside the vocabulary."""
    return np.stack([tokens_T for tokens_T, _ in map(self._row, numbers)])

  def counted(self, numbers: Sequence[int]) -> np.ndarray:
    """Which tokens count in the loss [n, T], bool."""
    return np.stack([counted_T for _, counted_T in map(self._row, numbers)])

  def _row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
    source, number = self.sources[self._source_N[n]], int(self._number_N[n])
    tokens_T, counted_T = source.read(source.held_out(number) if self._held_out else source.number(number))
    if self._vocab_size is not None and (largest := int(tokens_T.max())) >= self._vocab_size:
      raise InputError(
        source.part.setting,
        source.part.given,
        f"the tokenizer made token {largest}, the model has {self._vocab_size}; give the model's own by --tokenizer.",
      )
    return tokens_T, counted_T

  def about(self, read: int) -> list[dict]:
    """Per source, after `read` rows in all: weight, rows read, times that each row was read, and tokens if known."""
    found = []
    for i, source in enumerate(self.sources):
      passes, rest = divmod(read, len(self))
      rows = passes * source.needed + int(np.sum(self._source_N[:rest] == i))
      pool = source.needed if source.available is None else min(source.needed, source.available)
      found.append(
        {
          'name': source.part.name,
          'source': source.part.source,
          'weight': source.part.weight,
          'rows': rows,
          'tokens': source.num_tokens,
          'times': rows / max(1, pool),
        }
      )
    return found


def shares(weights: Sequence[float], rows: int) -> list[int]:
  """Rows of each source by the largest-remainder method; they sum to `rows`."""
  exact = np.array(weights) * rows
  counts = np.floor(exact + 1e-9).astype(int)
  for i in np.argsort(counts - exact, kind='stable')[: rows - counts.sum()]:
    counts[i] += 1
  return counts.tolist()
