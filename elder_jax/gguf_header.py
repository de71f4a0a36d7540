"""Is the head of a GGUF file one? Walked through before the gguf package believes the counts and lengths in it."""

import pathlib
import struct

# Bytes of each type of metadata value; 8 is a string, 9 an array (llama.cpp's gguf.h).
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check(path: pathlib.Path):
  """Raises ValueError, EOFError or OSError where a count, a length or a type cannot be right."""
  with path.open('rb') as file:
    walk = _Walk(file, path.stat().st_size)
    if walk.take(4) != b'GGUF':
      raise ValueError('it does not begin with GGUF')
    version = walk.number('<I')
    if version not in (2, 3):
      raise ValueError(f'version {version} is not known')
    tensors, fields = walk.count(24), walk.count(12)
    for _ in range(fields):
      walk.string()
      walk.value(walk.number('<I'))
    for _ in range(tensors):
      walk.string()
      if (dims := walk.number('<I')) > 4:
        raise ValueError(f'a tensor of {dims} dimensions')
      walk.skip(8 * dims + 4 + 8)


class _Walk:
  def __init__(self, file, size: int):
    self.file, self.size = file, size

  def take(self, count: int) -> bytes:
    octets = self.file.read(count)
    if len(octets) < count:
      raise EOFError('it ends too soon')
    return octets

  def skip(self, count: int):
    if self.file.tell() + count > self.size:
      raise EOFError('it ends too soon')
    self.file.seek(count, 1)

  def number(self, kind: str) -> int:
    return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

  def count(self, least: int) -> int:
    """A number of things of at least so many bytes each."""
    count = self.number('<Q')
    if self.file.tell() + count * least > self.size:
      raise EOFError(f'it cannot hold {count} entries')
    return count

  def string(self):
    self.skip(self.count(1))

  def value(self, kind: int):
    if kind == _STRING:
      self.string()
    elif kind == _ARRAY:
      kind = self.number('<I')
      if kind in _SIZES:
        self.skip(self.count(_SIZES[kind]) * _SIZES[kind])
      elif kind == _STRING:
        for _ in range(self.count(8)):
          self.string()
      else:
        raise ValueError(f'an array of type {kind}')
    elif kind in _SIZES:
      self.skip(_SIZES[kind])
    else:
      raise ValueError(f'a value of type {kind}')
