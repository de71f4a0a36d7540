"""The rows of tokens that a run trains on: several sources, mixed by weight, read as they are needed.

Row n is a function of the settings and the texts alone, however far a run is and on however many hosts it runs.
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
  """A source of a blend, as it was given: [name=]source[@weight], and by which setting."""

  setting: str
  given: str
  name: str
  source: str
  weight: float


def parts_of(entries: Sequence[str], setting: str) -> list[Part]:
  """The sources of --train_data, weights summing up to 1. Raises InputError."""
  parts = [_part(entry, setting) for entry in entries]
  for part in parts:
    if [p.name for p in parts].count(part.name) > 1:
      raise InputError(setting, part.given, f'the name {part.name!r} is given twice; name each source once.')
  total = sum(part.weight for part in parts)
  if total <= 0:
    raise InputError(setting, ','.join(entries), 'the weights sum up to 0; give one above 0.')
  return [dataclasses.replace(part, weight=part.weight / total) for part in parts]


def _part(entry: str, setting: str) -> Part:
  """What is there under the whole entry as its name is that; else a weight and a name are taken off."""
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
  """How a stream of tokens is cut: rows of `length` tokens that follow each other, each beginning with `first`."""

  length: int
  first: int | None = None

  @property
  def text_len(self) -> int:
    return self.length - (self.first is not None)


class Source:
  """The rows of one source: those held out, and those to train on."""

  def __init__(self, part: Part, store: TokenStore, window: Window, masked: bool):
    """masked: it has conversations of which not all tokens count."""
    self.part, self.masked, self._store, self._window = part, masked, store, window
    self._held, self._drawn, self.needed, self._orders = np.arange(0), None, 0, {}

  def num_rows(self, most: int | None = None) -> int:
    """Counted up to `most`; None: all, for which the source is read to its end."""
    width = self._window.text_len
    return self._store.count(None if most is None else most * width) // width

  @property
  def num_tokens(self) -> int | None:
    """Of the whole source; None: its end was not reached."""
    return self._store.count() if self._store.whole else None

  def draw(self, needed: int, held: int, seed: int | None, whole: bool):
    """Settles which rows are held out, and which are the first `needed` ones to train on.

    Args:
      seed: of the draw; None: the rows in their order.
      whole: drawn from all that the source has; else in its order, the held-out ones first.
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
    """Rows to train on before they repeat; None: the end was not reached."""
    if self._drawn is not None:
      return len(self._drawn)
    return self.num_rows() - len(self._held) if self._store.whole else None

  def held_out(self, j: int) -> int:
    """The stream's row that is number j of those held out."""
    return int(self._held[j])

  def number(self, j: int) -> int:
    """The stream's row that is number j of those trained on; they begin anew when all were read."""
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
    """What to say of a source that has not so many rows."""
    window = self._window
    return (
      f'has {self._store.count()} tokens, {wanted} of --seq_len={window.length} need {rows * window.text_len}; give a '
      'longer text or ask for fewer.'
    )

  def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """A row of the stream: its tokens, and which of them count in the loss."""
    window = self._window
    tokens_T, counted_T = self._store.read(number * window.text_len, window.text_len)
    if not self.masked and not counted_T.all():
      raise InputError(
        self.part.setting, self.part.given, 'has conversations behind texts; make them a source of their own.'
      )
    if window.first is not None:
      tokens_T, counted_T = np.append(np.int32(window.first), tokens_T), np.append(False, counted_T)
    return tokens_T, counted_T


class Rows:
  """Rows [T] of all sources; `rows[numbers]` is [n, T]. Sources take turns so that each part of a run has the weights."""

  def __init__(self, sources: list[Source], counts: list[int], held_out: bool = False, vocab_size: int | None = None):
    """The rows of all sources.

    Args:
      counts: rows of each source.
      held_out: they are those held out, else those to train on.
      vocab_size: of the model, which no token may exceed.
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
    """Tokens [n, T], int32. Raises InputError."""
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
        f'the tokenizer made token {largest}, the model has {self._vocab_size}; give its own by --tokenizer.',
      )
    return tokens_T, counted_T

  def about(self, read: int) -> list[dict]:
    """Of each source, after `read` rows: its weight, the rows read, how often each, its tokens where known."""
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
  """Rows of each source, by the largest remainders; they sum up to `rows`."""
  exact = np.array(weights) * rows
  counts = np.floor(exact + 1e-9).astype(int)
  for i in np.argsort(counts - exact, kind='stable')[: rows - counts.sum()]:
    counts[i] += 1
  return counts.tolist()
