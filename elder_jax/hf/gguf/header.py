"""Reads the header of a GGUF file (llama.cpp's gguf.h): its metadata and the positions of its tensors.

Counts, lengths and types are checked before they are used. The reader of the gguf package does not check them, and is
thirty times slower with a large vocabulary. Dequantisation uses the package.
"""

import math
import pathlib
import struct
from typing import NamedTuple

import gguf
import numpy as np

from elder_jax.errors import InputError

# Type of a metadata value -> letter of struct; 8 is a string, 9 an array.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_PLAIN = {gguf.GGMLQuantizationType.F32: np.dtype('<f4'), gguf.GGMLQuantizationType.F16: np.dtype('<f2')}
_TYPES = {int(kind): kind for kind in gguf.GGMLQuantizationType}
_ALIGNMENT = 32  # the default of general.alignment
# First bytes of files that are often mistaken for a GGUF file.
_NOT_GGUF = {
  b'version https://git-lfs': 'is a Git LFS pointer, not the file itself; run git lfs pull.',
  **dict.fromkeys((b'lmgg', b'fmgg', b'tjgg', b'algg'), 'is older than GGUF; convert the original model again.'),
}


class Tensor(NamedTuple):
  """A tensor; gguf.dequantize accepts its data and type."""

  name: str
  shape: tuple[int, ...]  # the fastest axis first
  tensor_type: gguf.GGMLQuantizationType
  data: np.ndarray  # a view of the file, the slowest axis first; for quantised types, bytes


def read(path: pathlib.Path) -> tuple[dict, list[Tensor]]:
  """(metadata by name, tensors) of one file. Raises the same errors as `read_raw`."""
  fields, _, tensors = read_raw(path)
  return fields, tensors


def read_raw(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[Tensor]]:
  """(metadata by name, the same as encoded in the file: type and value, tensors) of one file.

  Raises:
    InputError: the file is complete, but its format or version is not supported.
    ValueError, EOFError, OSError: the file is damaged or cannot be read.
  """
  content = np.asarray(np.memmap(path, np.uint8, 'r'))
  if what := next((what for begin, what in _NOT_GGUF.items() if content[:32].tobytes().startswith(begin)), None):
    raise InputError(f'{path}: {what}')
  walk = _Walk(content)
  if walk.take(4) != b'GGUF':
    raise ValueError('it does not begin with GGUF')
  version = walk.number('I')
  if version not in (2, 3):
    if version and version % 2**16 == 0:
      raise InputError(
        f'{path}: is a big-endian GGUF file; convert it with gguf-convert-endian {path.name} little (pip install gguf).'
      )
    raise InputError(
      f'{path}: has GGUF version {version}, only 2 and 3 are supported; convert the original model with a new llama.cpp.'
    )
  num_tensors, num_fields = walk.count(24), walk.count(12)
  fields, raw = {}, {}
  for _ in range(num_fields):
    name = walk.string()
    if name in fields:
      raise ValueError(f'it has the field {name!r} twice')
    begin = walk.at
    fields[name] = walk.value(walk.number('I'))
    raw[name] = bytes(walk.view[begin : walk.at])
  heads = {}
  for _ in range(num_tensors):
    name = walk.string()
    if name in heads:
      raise ValueError(f'it has the tensor {name!r} twice')
    if (dims := walk.number('I')) > 4:
      raise ValueError(f'the tensor {name!r} has {dims} dimensions')
    shape = tuple(walk.number('Q') for _ in range(dims))
    if (kind := walk.number('I')) not in _TYPES:
      raise InputError(
        f"{path}: the tensor {name} has the unknown quantisation type {kind} (a fork's, or newer than the installed gguf "
        'package); use a file of this model in Q8_0 or F16.'
      )
    heads[name] = shape, _TYPES[kind], walk.number('Q')
  alignment = fields.get('general.alignment', _ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
    raise ValueError('general.alignment is not a power of two')
  begin = -(-walk.at // alignment) * alignment
  tensors = [Tensor(name, *head[:2], _data(content, begin + head[2], *head[:2])) for name, head in heads.items()]
  return fields, raw, tensors


def _data(content: np.ndarray, begin: int, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  fastest, *rest = shape or (1,)
  if fastest % block_size:
    raise ValueError(f'a row of {fastest} values is not a multiple of the block size {block_size}')
  row = fastest // block_size * block_bytes
  end = begin + row * math.prod(rest)
  if end > len(content):
    raise EOFError('it ends too early')
  data = content[begin:end].reshape(*rest[::-1], row)
  return data.view(_PLAIN[kind]) if kind in _PLAIN else data


class _Walk:
  """Reads little-endian values one after the other; `at` is the position of the next."""

  def __init__(self, content: np.ndarray):
    self.view, self.at = memoryview(content), 0

  def take(self, count: int) -> bytes:
    self.at += count
    if self.at > len(self.view):
      raise EOFError('it ends too early')
    return bytes(self.view[self.at - count : self.at])

  def number(self, letter: str):
    kind = f'<{letter}'
    return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

  def count(self, least: int) -> int:
    """A number of entries, each of which takes at least `least` bytes."""
    count = self.number('Q')
    if self.at + count * least > len(self.view):
      raise EOFError(f'it is too short for {count} entries')
    return count

  def string(self) -> str:
    return self.take(self.count(1)).decode()

  def value(self, kind: int):
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind != _ARRAY:
      raise ValueError(f'it has a value of the unknown type {kind}')
    kind = self.number('I')
    if kind == _STRING:
      return [self.string() for _ in range(self.count(8))]
    if kind not in _SCALARS:
      raise ValueError(f'it has an array of the unknown type {kind}')
    dtype = np.dtype(f'<{_SCALARS[kind]}')
    return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
