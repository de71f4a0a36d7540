"""Caches the tokens of a source in files. They are made on demand, once, so memory does not grow with the corpus.

A store is a folder of segments. A segment depends only on the source, the tokenizer and the options, which the name of
the folder identifies. It is renamed into place when complete, so a killed or concurrent writer does no harm.
"""

import bisect
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import threading
import time
from typing import NamedTuple
import uuid

import numpy as np

from elder_jax.devices import hosts
from elder_jax.text.documents import Place

SEGMENT = 2**20  # least tokens of a segment; it ends with a document
_AHEAD = 2  # segments that are made in advance
_PATIENCE = 0.2  # seconds between polls for another process's segments

# A document or a piece of one: tokens (int [N]), which of them count in the loss (bool [N], None: all), place after it.
Encoded = tuple[np.ndarray, np.ndarray | None, Place]


class _Segment(NamedTuple):
  first: int  # index of its first token in the stream
  count: int  # tokens
  masked: bool
  place: Place  # where the next segment starts
  last: bool


class TokenStore:
  """The stream of tokens of a source."""

  def __init__(self, folder: pathlib.Path, encode: Callable[[Place], Iterator[Encoded]], vocab_size: int):
    """Opens the store of a folder, which may hold segments already.

    Args:
      folder: its name identifies everything that the tokens depend on.
      encode: yields the tokens from a place on.
      vocab_size: of the tokenizer; up to 65,536, a token takes 2 bytes, else 4.
    """
    self._folder, self._encode = folder, encode
    self._dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
    self._segments: list[_Segment] = []
    self._wanted, self._error = 0, None  # segments that the writer may make; the error that ended it
    self._changed, self._writer = threading.Condition(), None

  def count(self, most: int | None = None) -> int:
    """Tokens of the stream, made and counted up to `most`; None counts all of them."""
    while not (self._segments and self._segments[-1].last):
      if most is not None and self._known >= most:
        return self._known
      self._segments.append(self._segment(len(self._segments)))
    return self._known

  @property
  def _known(self) -> int:
    return self._segments[-1].first + self._segments[-1].count if self._segments else 0

  @property
  def whole(self) -> bool:
    """Whether the end of the source is known."""
    return bool(self._segments) and self._segments[-1].last

  def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [count], which of them count in the loss, bool [count]); shorter at the end of the stream."""
    end = min(first + count, self.count(first + count))
    tokens, masks, at = [np.zeros(0, np.int32)], [np.zeros(0, bool)], first
    while at < end:
      i = bisect.bisect_right(self._segments, at, key=lambda segment: segment.first) - 1
      segment = self._segments[i]
      size = min(end, segment.first + segment.count) - at
      tokens.append(self._part(i, '.tokens', self._dtype, at - segment.first, size).astype(np.int32))
      mask = self._part(i, '.mask', np.dtype(bool), at - segment.first, size) if segment.masked else None
      masks.append(np.ones(size, bool) if mask is None else mask)
      at += size
    return np.concatenate(tokens), np.concatenate(masks)

  def _part(self, i: int, suffix: str, dtype: np.dtype, first: int, count: int) -> np.ndarray:
    """Maps the file only for this read: pages that stay mapped count as memory of the process."""
    path = self._path(i, suffix)
    return np.array(np.memmap(path, dtype, 'r', offset=first * dtype.itemsize, shape=(count,)))

  def _path(self, i: int, suffix: str) -> pathlib.Path:
    return self._folder / f'{i:06d}{suffix}'

  # ---- making ----

  def _segment(self, i: int) -> _Segment:
    """Waits for segment i. The writer of process 0 makes it."""
    with self._changed:
      self._wanted = max(self._wanted, i + 1 + _AHEAD)
      self._changed.notify_all()
    while (found := self._load(i)) is None:
      if hosts.is_leader():
        self._start_writer(i)
        with self._changed:
          if self._error is not None:
            raise self._error
          self._changed.wait(_PATIENCE)
      else:
        time.sleep(_PATIENCE)
    return found

  def _load(self, i: int) -> _Segment | None:
    try:
      about = json.loads(self._path(i, '.json').read_text())
    except (OSError, ValueError):
      return None
    return _Segment(self._known, about['tokens'], about['masked'], Place(*about['place']), about['last'])

  def _start_writer(self, i: int):
    if self._writer is None:
      place = self._segments[-1].place if self._segments else Place(0, 0)
      self._writer = threading.Thread(target=self._write_all, args=(i, place), daemon=True)
      self._writer.start()

  def _write_all(self, i: int, place: Place):
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._remove_left_behind()
      parts = self._encode(place)
      last = False
      while not last:
        with self._changed:
          while i >= self._wanted:
            self._changed.wait()
        last = self._write(i, parts)
        i += 1
        with self._changed:
          self._changed.notify_all()
    except BaseException as e:  # raised in the waiting thread  # noqa: BLE001
      with self._changed:
        self._error = e
        self._changed.notify_all()

  def _remove_left_behind(self):
    """Removes files that a killed writer left behind an hour ago or more."""
    for path in self._folder.glob('*.partial'):
      with contextlib.suppress(OSError):  # another run has done the same
        if time.time() - path.stat().st_mtime > 3600:
          path.unlink()

  def _write(self, i: int, parts: Iterator[Encoded]) -> bool:
    """Writes segment i. Returns whether it is the last."""
    tokens, masks, count = [np.zeros(0, self._dtype)], [np.zeros(0, bool)], 0
    masked, after, last = False, Place(0, 0), True
    for tokens_N, mask_N, place in parts:
      after = place
      tokens.append(tokens_N.astype(self._dtype))
      masks.append(np.ones(len(tokens_N), bool) if mask_N is None else mask_N)
      masked |= mask_N is not None
      count += len(tokens_N)
      if count >= SEGMENT:
        last = False
        break
    self._write_file(self._path(i, '.tokens'), np.concatenate(tokens).tobytes())
    if masked:
      self._write_file(self._path(i, '.mask'), np.concatenate(masks).tobytes())
    about = {'tokens': count, 'masked': masked, 'place': after, 'last': last}
    self._write_file(self._path(i, '.json'), json.dumps(about).encode())
    return last

  def _write_file(self, path: pathlib.Path, content: bytes):
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.partial')  # another run may write the same segment
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
