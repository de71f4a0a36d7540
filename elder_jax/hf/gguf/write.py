"""A GGUF file, written field by field and tensor by tensor; what is taken over from another file keeps its octets."""

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
_PIECE = 2**24  # octets that are written at a time


def uint32(value: int) -> bytes:
  """A field as it stands in the file: type and value."""
  return struct.pack('<II', _UINT32, value)


def flags(values: Iterable[bool]) -> bytes:
  """An array of booleans."""
  octets = bytes(map(bool, values))
  return struct.pack('<IIQ', _ARRAY, _BOOL, len(octets)) + octets


def with_entries(raw: bytes, entries: list[int]) -> bytes:
  """An array field that has only these entries of `raw`, in the same type."""
  _, kind, count = struct.unpack_from('<IIQ', raw)
  size = (len(raw) - 16) // count
  return struct.pack('<IIQ', _ARRAY, kind, len(entries)) + b''.join(raw[16 + size * i :][:size] for i in entries)


def num_octets(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
  """Of a tensor of this type."""
  of_block, octets_of_block = gguf.GGML_QUANT_SIZES[kind]
  return math.prod(shape) // of_block * octets_of_block


def write(
  path: pathlib.Path,
  fields: dict[str, bytes],
  tensors: list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]],
  data_of: Callable[[int], np.ndarray],
  alignment: int = 32,
  told: Callable[[int, int], None] = lambda done, of: None,
) -> str:
  """Writes the file and returns its sha256.

  Args:
    fields: as they stand in a file, by name.
    tensors: (name, shape with the fastest axis first, type).
    data_of: from an index into `tensors` to its octets, as an array of any type.
    told: called with (octets written, octets in all).
  """
  head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(fields))
  head += b''.join(_string(name) + raw for name, raw in fields.items())
  end = 0
  for name, shape, kind in tensors:
    head += _string(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, int(kind), end)
    end += -(-num_octets(shape, kind) // alignment) * alignment
  digest, done, total = hashlib.sha256(), 0, sum(num_octets(shape, kind) for _, shape, kind in tensors)
  with path.open('wb') as file:

    def put(octets):
      file.write(octets)
      digest.update(octets)

    put(head + b'\0' * (-len(head) % alignment))
    for i, (name, shape, kind) in enumerate(tensors):
      octets = np.ascontiguousarray(data_of(i)).reshape(-1).view(np.uint8)
      assert octets.size == num_octets(shape, kind), name
      for at in range(0, octets.size, _PIECE):
        preemption.check_alone()
        put(memoryview(octets[at : at + _PIECE]))
      put(b'\0' * (-octets.size % alignment))
      done += octets.size
      told(done, total)
    sync(file)
  return digest.hexdigest()


def take_over(tensor: Tensor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]:
  """A tensor of another file, as `write` takes it."""
  return tensor.name, tensor.shape, tensor.tensor_type


def _string(text: str) -> bytes:
  octets = text.encode()
  return struct.pack('<Q', len(octets)) + octets
