"""Safetensors files: headers through the package, which checks them; tensors in pieces, which it cannot.

The package gives whole tensors only, and writes a file only from all of its tensors at once.
"""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import safetensors

from elder_jax.errors import InputError
from elder_jax.errors import reason

DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
PIECE = 2**22  # bytes of a tensor that is copied in pieces


def read_json(path: pathlib.Path) -> dict:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise InputError(f'{path}: is not readable as JSON ({reason(e)}); fetch the file again.') from e
  if not isinstance(value, dict):
    raise InputError(f'{path}: must hold a JSON object; fetch the file again.')
  return value


def open_folder(folder: pathlib.Path):
  """Headers of all shards: ({name: shape}, {name: dtype}, read, pieces).

  A dtype is one of DTYPES' values or, of what `read` does not read, safetensors' own name, such as U8.
  """
  single, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
  where = None
  if single.is_file():
    paths = [single]
  elif index.is_file():
    where = read_json(index).get('weight_map')
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
      raise InputError(f'{index}: has no weight_map of names to files; fetch the file again.')
    paths = []
    for file in sorted(set(where.values())):
      # A plain name: an index from a stranger must not make us read outside the folder.
      if pathlib.PurePath(file).name != file or '\\' in file or file in ('.', '..'):
        raise InputError(
          f'{index}: names {file!r}, which is outside the folder; use a checkpoint from a trusted source.'
        )
      if not (folder / file).is_file():
        raise InputError(f'{index}: names {file}, which is not in the folder; fetch the missing file.')
      paths.append(folder / file)
  else:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl'))
    if pickles:
      raise InputError(
        f'{folder / pickles[0]}: is a pickle checkpoint, which can run code when read; convert it to safetensors first.'
      )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in ('.safetensors', '.gguf'))
    if any(re.fullmatch(r'model-\d+-of-\d+\.safetensors', name) for name in others):
      raise InputError(f'{folder}: has {others[0]} but no model.safetensors.index.json; fetch that file, too.')
    have = f' (but {", ".join(others[:3])})' if others else ''
    raise InputError(
      f'{folder}: has no model.safetensors and no model.safetensors.index.json{have}; fetch the weights, or give a '
      '.gguf file by its own path.'
    )

  shapes, dtypes, home = {}, {}, {}
  for path in paths:
    with _opened(path) as file:
      for name in file.keys():  # noqa: SIM118 (not a dict)
        if name in home:
          _check_equal(name, home[name], path)
          continue
        tensor = file.get_slice(name)
        shapes[name], home[name] = tuple(tensor.get_shape()), path
        dtypes[name] = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
  for name, file in (where or {}).items():
    if name not in home or (home[name].name != file and not _holds(folder / file, name)):
      raise InputError(f'{index}: says that {name} is in {file}, but it is not; use the index of these files.')

  begins = {path: _data_begins(path) for path in paths}

  def opened_at(name: str):
    begin, header = begins[home[name]]
    file = home[name].open('rb', buffering=0)
    file.seek(begin + header[name]['data_offsets'][0])
    return file

  def read(name: str) -> np.ndarray:
    """A view of the file: what is not looked at is not read."""
    dtype = jnp.dtype(dtypes[name])
    if not (count := math.prod(shapes[name])):
      return np.empty(shapes[name], dtype)
    begin, header = begins[home[name]]
    start = begin + header[name]['data_offsets'][0]
    try:
      octets = np.memmap(home[name], np.uint8, 'r', start, count * dtype.itemsize)
    except ValueError as e:
      raise _shorter(home[name]) from e
    return np.asarray(octets).view(dtype).reshape(shapes[name])

  def pieces(name: str) -> Iterator[np.ndarray]:
    dtype = jnp.dtype(dtypes[name])
    left, buffers = math.prod(shapes[name]), [np.empty(PIECE // dtype.itemsize, dtype) for _ in range(2)]
    with opened_at(name) as file:
      while left:
        buffers.reverse()
        piece = buffers[0][:left]
        _read_all(file, piece.view(np.uint8))
        left -= piece.size
        yield piece

  return shapes, dtypes, read, pieces


def _check_equal(name: str, first: pathlib.Path, second: pathlib.Path):
  """A tensor that two files have is no harm where both have the same."""
  octets = []
  for path in (first, second):
    begin, header = _data_begins(path)
    about = header[name]
    with path.open('rb') as file:
      file.seek(begin + about['data_offsets'][0])
      octets.append((about['dtype'], about['shape'], file.read(about['data_offsets'][1] - about['data_offsets'][0])))
  if octets[0] != octets[1]:
    raise InputError(f'{second}: the tensor {name} is also in {first.name}, with other values; remove one of the two.')


def _holds(path: pathlib.Path, name: str) -> bool:
  return name in _data_begins(path)[1]


def finite(tensor: np.ndarray) -> bool:
  """By the exponent's bits, of which one that is not finite has all; in pieces that stay in the cache."""
  kind, exponent = {
    'float32': (np.uint32, 0x7F800000),
    'float16': (np.uint16, 0x7C00),
    'bfloat16': (np.uint16, 0x7F80),
  }[str(tensor.dtype)]
  bits = np.ascontiguousarray(tensor).reshape(-1).view(kind)
  size = 2**18
  return all(np.bitwise_and(bits[i : i + size], exponent).max() < exponent for i in range(0, len(bits), size))


def _read_all(file, octets: np.ndarray):
  rest = memoryview(octets)
  while len(rest):
    if not (count := file.readinto(rest)):
      raise _shorter(file.name)
    rest = rest[count:]


def _shorter(path) -> InputError:
  return InputError(f'{path}: has become shorter while it was read; fetch it again.')


def _opened(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework='np')
  except (safetensors.SafetensorError, OSError) as e:
    what = f'is truncated or not a safetensors file ({reason(e)})'
    with contextlib.suppress(OSError), path.open('rb') as file:
      if file.read(20).startswith(b'version https://git'):
        raise InputError(f'{path}: {what}: it is a Git LFS pointer; run git lfs pull.') from e
    raise InputError(f'{path}: {what}; fetch it again.') from e


def _data_begins(path: pathlib.Path) -> tuple[int, dict[str, dict]]:
  """(where the tensors begin in a safetensors file, {name: what the header says}); the package has checked the header."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(size))
  return 8 + size, {name: about for name, about in header.items() if name != '__metadata__'}


def write(path: pathlib.Path, tensors: list[tuple[str, tuple[int, ...], str]], pieces_of) -> str:
  """Writes a safetensors file, tensor after tensor; returns its sha256. (The package wants all of them at once.)

  Args:
    tensors: (name, shape, dtype) in the order of the file.
    pieces_of: from an index into `tensors` to its arrays, which come one after the other, whatever their type.

  Raises:
    InputError: a value does not fit the type that it is written in.
  """
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name, shape, dtype in tensors:
    begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
    kind = next(theirs for theirs, ours in DTYPES.items() if ours == dtype)
    header[name] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  digest, octets = hashlib.sha256(), len(text).to_bytes(8, 'little') + text
  # One piece is hashed while it is written and the next is read.
  with path.open('wb', buffering=0) as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
    hashed = thread.submit(digest.update, octets)
    _write_all(file, octets)
    for i, (name, _, dtype) in enumerate(tensors):
      for piece in pieces_of(i):
        octets = _converted(name, piece, dtype).reshape(-1).view(np.uint8)
        hashed.result()
        hashed = thread.submit(digest.update, octets)
        _write_all(file, octets)
      assert file.tell() == 8 + len(text) + header[name]['data_offsets'][1], name
    hashed.result()
    os.fsync(file.fileno())
  return digest.hexdigest()


def _converted(name: str, piece: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over='ignore'):  # it is looked at
    converted = np.ascontiguousarray(piece, jnp.dtype(dtype))
  if converted.dtype != piece.dtype and not finite(converted):
    raise InputError(
      f'the tensor {name} has values of up to {np.max(np.abs(piece)):.3g}, which do not fit {dtype}; use '
      '--export_dtype=bfloat16 or float32.'
    )
  return converted


def _write_all(file, octets):
  """Unbuffered files may take less than all at once."""
  rest = memoryview(octets)
  while len(rest):
    rest = rest[file.write(rest) :]
