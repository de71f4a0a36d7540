"""The head of a GGUF file (llama.cpp's gguf.h): its metadata, and where its tensors lie.

No count, length or type in it is believed before the file is seen to be long enough for it. The gguf package's reader does
believe them, and is thirty times slower with a large vocabulary; the quantisations are the package's.
"""

import math
import pathlib
import struct
from typing import NamedTuple

import gguf
import numpy as np

from elder_jax.errors import InputError

# Type of a metadata value -> struct's letter; 8 is a string, 9 an array.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_PLAIN = {gguf.GGMLQuantizationType.F32: np.dtype('<f4'), gguf.GGMLQuantizationType.F16: np.dtype('<f2')}
_TYPES = {int(kind): kind for kind in gguf.GGMLQuantizationType}
_ALIGNMENT = 32  # where general.alignment says nothing
# How files begin that are often taken for a GGUF file.
_NOT_GGUF = {
  b'version https://git-lfs': 'is a Git LFS pointer, not the file itself; run git lfs pull.',
  **dict.fromkeys((b'lmgg', b'fmgg', b'tjgg', b'algg'), 'is older than GGUF; convert the original model again.'),
}


class Tensor(NamedTuple):
  """As gguf.dequantize takes it."""

  name: str
  shape: tuple[int, ...]  # the fastest axis first
  tensor_type: gguf.GGMLQuantizationType
  data: np.ndarray  # a view of the file; of quantised types bytes, the slowest axis first


def read(path: pathlib.Path) -> tuple[dict, list[Tensor]]:
  """(metadata by name, tensors) of one file; raises as `read_raw`."""
  fields, _, tensors = read_raw(path)
  return fields, tensors


def read_raw(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[Tensor]]:
  """(metadata by name, the same as it stands in the file: type and value, tensors) of one file.

  Raises:
    InputError: it is whole, but of a kind that is not read.
    ValueError, EOFError, OSError: it cannot be what it says.
  """
  octets = np.asarray(np.memmap(path, np.uint8, 'r'))
  if what := next((what for begin, what in _NOT_GGUF.items() if octets[:32].tobytes().startswith(begin)), None):
    raise InputError(f'{path}: {what}')
  walk = _Walk(octets)
  if walk.take(4) != b'GGUF':
    raise ValueError('it does not begin with GGUF')
  version = walk.number('I')
  if version not in (2, 3):
    if version and version % 2**16 == 0:
      raise InputError(
        f'{path}: is a big-endian GGUF file; convert it with gguf-convert-endian {path.name} little (pip install gguf).'
      )
    raise InputError(
      f'{path}: is of GGUF version {version}, only 2 and 3 are read; convert the original model with a current llama.cpp.'
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
      raise ValueError(f'a tensor of {dims} dimensions')
    shape = tuple(walk.number('Q') for _ in range(dims))
    if (kind := walk.number('I')) not in _TYPES:
      raise InputError(
        f"{path}: the tensor {name} has the quantisation type {kind}, which llama.cpp does not have (a fork's, or newer "
        'than the gguf package here); use a file of this model in Q8_0 or F16.'
      )
    heads[name] = shape, _TYPES[kind], walk.number('Q')
  alignment = fields.get('general.alignment', _ALIGNMENT)
  if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
    raise ValueError('general.alignment is no power of two')
  begin = -(-walk.at // alignment) * alignment
  tensors = [Tensor(name, *head[:2], _data(octets, begin + head[2], *head[:2])) for name, head in heads.items()]
  return fields, raw, tensors


def _data(octets: np.ndarray, begin: int, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
  of_block, octets_of_block = gguf.GGML_QUANT_SIZES[kind]
  fastest, *rest = shape or (1,)
  if fastest % of_block:
    raise ValueError(f'a row of {fastest} does not fill blocks of {of_block}')
  row = fastest // of_block * octets_of_block
  end = begin + row * math.prod(rest)
  if end > len(octets):
    raise EOFError('it ends too soon')
  data = octets[begin:end].reshape(*rest[::-1], row)
  return data.view(_PLAIN[kind]) if kind in _PLAIN else data


class _Walk:
  """Reads one thing after the other; little-endian."""

  def __init__(self, octets: np.ndarray):
    self.view, self.at = memoryview(octets), 0

  def take(self, count: int) -> bytes:
    self.at += count
    if self.at > len(self.view):
      raise EOFError('it ends too soon')
    return bytes(self.view[self.at - count : self.at])

  def number(self, letter: str):
    kind = f'<{letter}'
    return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

  def count(self, least: int) -> int:
    """A number of things of at least so many bytes each."""
    count = self.number('Q')
    if self.at + count * least > len(self.view):
      raise EOFError(f'it cannot hold {count} entries')
    return count

  def string(self) -> str:
    return self.take(self.count(1)).decode()

  def value(self, kind: int):
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.number(_SCALARS[kind])
    if kind != _ARRAY:
      raise ValueError(f'a value of type {kind}')
    kind = self.number('I')
    if kind == _STRING:
      return [self.string() for _ in range(self.count(8))]
    if kind not in _SCALARS:
      raise ValueError(f'an array of type {kind}')
    dtype = np.dtype(f'<{_SCALARS[kind]}')
    return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype).tolist()
