"""Copies tensors from one safetensors file to another, byte for byte, whatever their type."""

from collections.abc import Iterable
from collections.abc import Iterator
import hashlib
import json
import pathlib

from elder_jax.devices import preemption
from elder_jax.hf import safetensors_files

PIECE = 2**24  # bytes that are copied at a time


def write(source: pathlib.Path, names: Iterable[str], path: pathlib.Path) -> tuple[str, int]:
  """Writes a file with the named tensors of a folder.

  Returns:
    (sha256 of the file, bytes of the tensors).
  """
  wanted, tensors = set(names), []
  for file, (begin, header) in safetensors_files.headers(source).items():
    tensors += [(file, begin, name, header[name]) for name in header if name in wanted]
    wanted -= header.keys()
  digest = hashlib.sha256()
  with path.open('wb') as out:
    head = _head([(name, about) for _, _, name, about in tensors], {'format': 'pt'})
    out.write(head)
    digest.update(head)
    for file, begin, _, about in tensors:
      for piece in pieces(file, begin, about):
        preemption.check_alone()
        out.write(piece)
        digest.update(piece)
    safetensors_files.sync(out)
  return digest.hexdigest(), sum(size(about) for *_, about in tensors)


def total(source: pathlib.Path, names: Iterable[str]) -> int:
  """Bytes of the named tensors of a folder."""
  sizes = {
    name: size(about) for _, header in safetensors_files.headers(source).values() for name, about in header.items()
  }
  return sum(sizes[name] for name in names)


def content(path: pathlib.Path, begin: int, tensors: list[tuple[str, str, dict]]) -> Iterator[bytes]:
  """The content of a safetensors file with tensors of another one, in pieces.

  Args:
    path: the file to copy from.
    begin: the offset of its first tensor.
    tensors: (old name, new name, header) of the tensors to copy.
  """
  yield _head([(new, about) for _, new, about in tensors], safetensors_files.metadata(path))
  for _, _, about in tensors:
    yield from pieces(path, begin, about)


def _head(tensors: list[tuple[str, dict]], metadata: dict[str, str]) -> bytes:
  header: dict[str, dict] = {'__metadata__': metadata}
  end = 0
  for name, about in tensors:
    start, end = end, end + size(about)
    header[name] = {'dtype': about['dtype'], 'shape': about['shape'], 'data_offsets': [start, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def pieces(path: pathlib.Path, begin: int, about: dict) -> Iterator[bytes]:
  """The bytes of a tensor, at most PIECE at a time; `begin` is the offset of the file's first tensor."""
  first, end = about['data_offsets']
  with path.open('rb') as file:
    file.seek(begin + first)
    for at in range(first, end, PIECE):
      yield file.read(min(PIECE, end - at))


def size(about: dict) -> int:
  """Bytes of a tensor, according to its header."""
  first, end = about['data_offsets']
  return end - first
