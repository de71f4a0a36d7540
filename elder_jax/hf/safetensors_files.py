"""Safetensors files: opened with the safetensors package, which checks headers; read as views, written tensor by tensor.

The package itself returns copies where `load` needs views of the file, and it needs all tensors at once to write a file.
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
PIECE = 2**22  # bytes of a tensor that are read at a time, but at least one row
_INDEX = 'model.safetensors.index.json'


def read_json(path: pathlib.Path) -> dict:
  """The JSON object in a file. Raises InputError if there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise InputError(f'{path}: is not readable as JSON ({reason(e)}); fetch the file again.') from e
  if not isinstance(value, dict):
    raise InputError(f'{path}: must hold a JSON object; fetch the file again.')
  return value


def open_folder(folder: pathlib.Path):
  """Reads the headers of all shards.

  Returns:
    ({name: shape}, {name: dtype}, read, pieces). A dtype is a value of DTYPES, or safetensors' own name, such as U8, for
    types that `read` does not support. `read(name)` returns a view of the file, `pieces(name)` a few rows at a time.

  Raises:
    InputError: a file is missing or damaged, or the index does not match the files.
  """
  paths, weight_map = _shards(folder)
  tensors = _Tensors()
  for path in paths:
    tensors.add(path)
  for name, file in weight_map.items():
    if name not in tensors.home or (tensors.home[name].name != file and name not in _names(folder / file)):
      raise InputError(_not_there(folder, name, file))
  return tensors.shapes, tensors.dtypes, tensors.read, tensors.pieces


def headers(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, dict[str, dict]]]:
  """{file: (offset of its first tensor, {name: header})} of all shards.

  Raises:
    InputError: a file is missing or truncated, or the index does not match the files.
  """
  paths, weight_map = _shards(folder)
  found = {}
  for path in paths:
    with _opened(path):
      found[path] = _data_begins(path)
  for name, file in weight_map.items():
    if name not in found[folder / file][1]:
      raise InputError(_not_there(folder, name, file))
  return found


def metadata(path: pathlib.Path) -> dict[str, str]:
  """The __metadata__ of a file."""
  with _opened(path) as file:
    return file.metadata() or {}


def sync(file):
  """Waits until everything written to a file is on the disk."""
  file.flush()
  os.fsync(file.fileno())


def _not_there(folder: pathlib.Path, name: str, file: str) -> str:
  return f'{folder / _INDEX}: lists {name} in {file}, which does not hold it; use the index of these files.'


def _shards(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
  """(files with tensors, the weight_map of the index: {tensor: file}, empty without an index)."""
  single, index = folder / 'model.safetensors', folder / _INDEX
  if single.is_file():
    return [single], {}
  if not index.is_file():
    raise InputError(_without_weights(folder))
  where = read_json(index).get('weight_map')
  if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
    raise InputError(f'{index}: has no weight_map of names to files; fetch the file again.')
  for file in sorted(set(where.values())):
    # Only plain names: a malicious index must not make us read outside the folder.
    if pathlib.PurePath(file).name != file or '\\' in file or file in ('.', '..'):
      raise InputError(f'{index}: names {file!r}, which is outside the folder; use a checkpoint from a trusted source.')
    if not (folder / file).is_file():
      raise InputError(f'{index}: names {file}, which is not in the folder; fetch the missing file.')
  return [folder / file for file in sorted(set(where.values()))], where


def _without_weights(folder: pathlib.Path) -> str:
  """The error for a folder with neither model.safetensors nor an index."""
  pickles = sorted(p.name for p in folder.iterdir() if p.suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl'))
  if pickles:
    return (
      f'{folder / pickles[0]}: is a pickle checkpoint, which can run code when read; convert it to safetensors first.'
    )
  others = sorted(p.name for p in folder.iterdir() if p.suffix in ('.safetensors', '.gguf'))
  if any(re.fullmatch(r'model-\d+-of-\d+\.safetensors', name) for name in others):
    return f'{folder}: has {others[0]} but no {_INDEX}; fetch that file too.'
  have = f' (but {", ".join(others[:3])})' if others else ''
  none = f'{folder}: has no model.safetensors and no {_INDEX}{have}'
  return f'{none}; fetch the weights, or give a .gguf file by its own path.'


class _Tensors:
  """The tensors of several files, by name."""

  def __init__(self):
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    self.home: dict[str, pathlib.Path] = {}
    self._offsets: dict[pathlib.Path, tuple[int, dict]] = {}

  def add(self, path: pathlib.Path):
    """Reads the headers of a file. A tensor may be in two files if both hold the same bytes."""
    with _opened(path) as file:
      for name in file.keys():  # noqa: SIM118 (not a dict)
        if name in self.home:
          _check_equal(name, self.home[name], path)
          continue
        tensor = file.get_slice(name)
        self.shapes[name], self.home[name] = tuple(tensor.get_shape()), path
        self.dtypes[name] = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
    self._offsets[path] = _data_begins(path)

  def read(self, name: str) -> np.ndarray:
    """A view of the file: only the parts that are used are read, also of a transposed tensor."""
    dtype, shape, path = jnp.dtype(self.dtypes[name]), self.shapes[name], self.home[name]
    if not (count := math.prod(shape)):
      return np.empty(shape, dtype)
    begin, header = self._offsets[path]
    start = begin + header[name]['data_offsets'][0]
    try:
      raw = np.memmap(path, np.uint8, 'r', start, count * dtype.itemsize)
    except ValueError as e:
      raise InputError(f'{path}: became shorter while it was read; fetch it again.') from e
    return np.asarray(raw).view(dtype).reshape(shape)

  def pieces(self, name: str) -> Iterator[np.ndarray]:
    """The tensor from start to end, a few rows at a time."""
    shape, itemsize, path = self.shapes[name], jnp.dtype(self.dtypes[name]).itemsize, self.home[name]
    rows = max(1, PIECE // (math.prod(shape[1:]) * itemsize or 1))
    with _opened(path) as file:
      try:
        if len(shape) < 2 or not math.prod(shape):
          yield file.get_tensor(name)
          return
        tensor = file.get_slice(name)
        for first in range(0, shape[0], rows):
          yield tensor[first : min(first + rows, shape[0])]
      except safetensors.SafetensorError as e:
        raise InputError(f'{path}: the tensor {name} cannot be read ({reason(e)}); fetch the file again.') from e


def _check_equal(name: str, first: pathlib.Path, second: pathlib.Path):
  kinds, contents = [], []
  for path in (first, second):
    with _opened(path) as file:
      kinds.append((file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()))
      contents.append(_raw(path, name))
  if kinds[0] != kinds[1] or contents[0] != contents[1]:
    raise InputError(f'{second}: the tensor {name} is also in {first.name}, with other values; remove one of the two.')


def _raw(path: pathlib.Path, name: str) -> bytes:
  """A tensor's bytes in the file: numpy does not have all types."""
  begin, header = _data_begins(path)
  first, end = header[name]['data_offsets']
  with path.open('rb') as file:
    file.seek(begin + first)
    return file.read(end - first)


def _names(path: pathlib.Path) -> set[str]:
  with _opened(path) as file:
    return set(file.keys())


def finite(tensor: np.ndarray) -> bool:
  """Whether all values of a float32, float16 or bfloat16 tensor are finite.

  NaN and infinity are the values with all exponent bits set. The tensor is checked in pieces that fit the CPU's cache.
  """
  kind, exponent = {
    'float32': (np.uint32, 0x7F800000),
    'float16': (np.uint16, 0x7C00),
    'bfloat16': (np.uint16, 0x7F80),
  }[str(tensor.dtype)]
  bits = np.ascontiguousarray(tensor).reshape(-1).view(kind)
  size = 2**18
  return all(np.bitwise_and(bits[i : i + size], exponent).max() < exponent for i in range(0, len(bits), size))


def _opened(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework='np')
  except (safetensors.SafetensorError, OSError) as e:
    problem = f'is truncated or not a safetensors file ({reason(e)})'
    with contextlib.suppress(OSError), path.open('rb') as file:
      if file.read(20).startswith(b'version https://git'):
        raise InputError(f'{path}: {problem}: it is a Git LFS pointer; run git lfs pull.') from e
    raise InputError(f'{path}: {problem}; fetch it again.') from e


def _data_begins(path: pathlib.Path) -> tuple[int, dict[str, dict]]:
  """(offset of the first tensor, {name: header}) of a file whose header the package has already checked."""
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(size))
  return 8 + size, {name: about for name, about in header.items() if name != '__metadata__'}


def write(path: pathlib.Path, tensors: list[tuple[str, tuple[int, ...], str]], pieces_of) -> str:
  """Writes a safetensors file, tensor by tensor, and returns its sha256.

  Args:
    tensors: (name, shape, dtype) in the order of the file.
    pieces_of: from an index into `tensors` to the consecutive pieces of that tensor, of any type.

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
  digest, data = hashlib.sha256(), len(text).to_bytes(8, 'little') + text
  # A piece is hashed in another thread while it is written and the next one is read.
  with path.open('wb', buffering=0) as file, concurrent.futures.ThreadPoolExecutor(1) as thread:
    hashed = thread.submit(digest.update, data)
    _write_all(file, data)
    for i, (name, _, dtype) in enumerate(tensors):
      for piece in pieces_of(i):
        data = _converted(name, piece, dtype).reshape(-1).view(np.uint8)
        hashed.result()
        hashed = thread.submit(digest.update, data)
        _write_all(file, data)
      assert file.tell() == 8 + len(text) + header[name]['data_offsets'][1], name
    hashed.result()
    sync(file)
  return digest.hexdigest()


def _converted(name: str, piece: np.ndarray, dtype: str) -> np.ndarray:
  with np.errstate(over='ignore'):  # checked below
    converted = np.ascontiguousarray(piece, jnp.dtype(dtype))
  if converted.dtype != piece.dtype and not finite(converted):
    raise InputError(
      f'the tensor {name} has values up to {np.max(np.abs(piece)):.3g}, which do not fit {dtype}; use '
      '--export_dtype=bfloat16 or float32.'
    )
  return converted


def _write_all(file, data):
  """An unbuffered file may write less than all of it at once."""
  rest = memoryview(data)
  while len(rest):
    rest = rest[file.write(rest) :]
