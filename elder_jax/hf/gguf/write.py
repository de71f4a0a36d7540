"""Writes a GGUF file, field by field and tensor by tensor. Fields and tensors of another file keep their bytes."""

from collections.abc import Callable
from collections.abc import Iterable
import hashlib
import math
import pathlib
import struct

import gguf
import numpy as np

from elder_jax.devices import preemption
from elder_jax.hf.gguf.header import Tensor
from elder_jax.hf.safetensors_files import sync

_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_PIECE = 2**24  # bytes that are written at a time


def uint32(value: int) -> bytes:
  """An encoded field: type and value."""
  return struct.pack('<II', _UINT32, value)


def flags(values: Iterable[bool]) -> bytes:
  """An encoded array of booleans."""
  content = bytes(map(bool, values))
  return struct.pack('<IIQ', _ARRAY, _BOOL, len(content)) + content


def with_entries(raw: bytes, entries: list[int]) -> bytes:
  """An encoded array with only these entries of the array `raw`."""
  _, kind, count = struct.unpack_from('<IIQ', raw)
  size = (len(raw) - 16) // count
  return struct.pack('<IIQ', _ARRAY, kind, len(entries)) + b''.join(raw[16 + size * i :][:size] for i in entries)


def num_bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
  """Bytes of a tensor of this shape and type."""
  block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // block_size * block_bytes


def write(
  path: pathlib.Path,
  fields: dict[str, bytes],
  tensors: list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]],
  data_of: Callable[[int], np.ndarray],
  alignment: int = 32,
  progress: Callable[[int, int], None] = lambda done, of: None,
) -> str:
  """Writes the file and returns its sha256.

  Args:
    fields: encoded fields by name.
    tensors: (name, shape with the fastest axis first, type).
    data_of: from an index into `tensors` to its data, an array of any type with the right number of bytes.
    alignment: tensors begin at multiples of this many bytes.
    progress: called with (bytes written, bytes in total).
  """
  head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(fields))
  head += b''.join(_string(name) + raw for name, raw in fields.items())
  end = 0
  for name, shape, kind in tensors:
    head += _string(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, int(kind), end)
    end += -(-num_bytes(shape, kind) // alignment) * alignment
  digest, done, total = hashlib.sha256(), 0, sum(num_bytes(shape, kind) for _, shape, kind in tensors)
  with path.open('wb') as file:

    def put(data):
      file.write(data)
      digest.update(data)

    put(head + b'\0' * (-len(head) % alignment))
    for i, (name, shape, kind) in enumerate(tensors):
      data = np.ascontiguousarray(data_of(i)).reshape(-1).view(np.uint8)
      assert data.size == num_bytes(shape, kind), name
      for at in range(0, data.size, _PIECE):
        preemption.check_alone()
        put(memoryview(data[at : at + _PIECE]))
      put(b'\0' * (-data.size % alignment))
      done += data.size
      progress(done, total)
    sync(file)
  return digest.hexdigest()


def take_over(tensor: Tensor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]:
  """(name, shape, type) of a tensor of another file, for `write`."""
  return tensor.name, tensor.shape, tensor.tensor_type


def _string(text: str) -> bytes:
  content = text.encode()
  return struct.pack('<Q', len(content)) + content
