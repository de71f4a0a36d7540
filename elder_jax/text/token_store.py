"""Tokens of a source, made as they are needed, once, and kept in files: memory does not grow with the corpus.

A store is a folder of segments. Each is a pure function of the source, the tokenizer and the options that the folder is
named after, and gets its name when it is whole: whoever is killed, or writes beside another, does no harm.
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

SEGMENT = 2**20  # tokens, and then to the end of the document
_AHEAD = 2  # segments that are made before they are asked for
_PATIENCE = 0.2  # seconds between two looks at what another process writes

# Tokens of one document, or of a part of one: int array, bool array (counts in the loss) or None, the place after it.
Encoded = tuple[np.ndarray, np.ndarray | None, Place]


class _Segment(NamedTuple):
  first: int  # its first token's number in the stream
  count: int
  masked: bool
  place: Place  # after it
  last: bool


class TokenStore:
  """The stream of tokens of a source."""

  def __init__(self, folder: pathlib.Path, encode: Callable[[Place], Iterator[Encoded]], vocab_size: int):
    """The store of a folder, as far as it is made.

    Args:
      folder: named after all that the tokens depend on.
      encode: what is to be read from a place on, as tokens.
      vocab_size: of the tokenizer; decides how wide a token is.
    """
    self._folder, self._encode = folder, encode
    self._dtype = np.dtype('<u2' if vocab_size <= 2**16 else '<u4')
    self._segments: list[_Segment] = []
    self._wanted, self._error = 0, None  # segments that the writer may make; what ended it
    self._changed, self._writer = threading.Condition(), None

  def count(self, most: int | None = None) -> int:
    """Tokens of the stream, made and counted up to `most`; None: all of them."""
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
    """(tokens, which of them count in the loss); both shorter than `count` at the end of the stream."""
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
    """Mapped for this moment only: pages that stay mapped count as this process's memory."""
    path = self._path(i, suffix)
    return np.array(np.memmap(path, dtype, 'r', offset=first * dtype.itemsize, shape=(count,)))

  def _path(self, i: int, suffix: str) -> pathlib.Path:
    return self._folder / f'{i:06d}{suffix}'

  # ---- making ----

  def _segment(self, i: int) -> _Segment:
    """Waits for segment i, which this process's writer makes, or process 0's."""
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
    except BaseException as e:  # told to whoever waits  # noqa: BLE001
      with self._changed:
        self._error = e
        self._changed.notify_all()

  def _remove_left_behind(self):
    """What was killed while it wrote, an hour ago or more."""
    for path in self._folder.glob('*.partial'):
      with contextlib.suppress(OSError):  # another run has done the same
        if time.time() - path.stat().st_mtime > 3600:
          path.unlink()

  def _write(self, i: int, parts: Iterator[Encoded]) -> bool:
    """Writes segment i; whether it is the last."""
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
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.partial')  # another run may write the same
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
