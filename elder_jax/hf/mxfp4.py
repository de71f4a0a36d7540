"""gpt-oss as published: the experts' matrices are in MXFP4 and are dequantised to bfloat16.

A block (OCP Microscaling Formats 1.0) is 32 four-bit numbers (E2M1) and a power of two, whose exponent is stored plus 127.
"""

from collections.abc import Callable
import math
import pathlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from elder_jax.errors import InputError
from elder_jax.hf import safetensors_files

_BLOCKS, _SCALES = '_blocks', '_scales'
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_E2M1, -_E2M1])


class Tensors(NamedTuple):
  """What safetensors_files.open_folder returns."""

  shapes: dict[str, tuple[int, ...]]
  dtypes: dict[str, str]
  read: Callable
  pieces: Callable


def is_packed(config: dict) -> bool:
  """Whether the weights are in MXFP4, according to config.json."""
  how = config.get('quantization_config')
  return config.get('model_type') == 'gpt_oss' and isinstance(how, dict) and how.get('quant_method') == 'mxfp4'


def unpacked(folder: pathlib.Path, tensors: Tensors) -> Tensors:
  """The tensors of the folder under the names that they have in an unquantised checkpoint.

  Raises:
    InputError: the shapes of blocks and scales do not match.
  """
  headers = safetensors_files.headers(folder)
  where = {name: (path, begin, header[name]) for path, (begin, header) in headers.items() for name in header}
  packed = {name.removesuffix(_BLOCKS) for name in tensors.shapes if name.endswith(_BLOCKS)}
  halves = {name + end for name in packed for end in (_BLOCKS, _SCALES)}
  shapes = {name: shape for name, shape in tensors.shapes.items() if name not in halves}
  for name in packed:
    shapes[name] = _shape(folder, name, tensors.shapes)

  def raw(name: str) -> np.ndarray:
    path, begin, about = where[name]
    return np.memmap(path, np.uint8, 'r', begin + about['data_offsets'][0], tuple(about['shape']))

  def read(name: str) -> np.ndarray:
    if name not in packed:
      return tensors.read(name)
    return dequantised(raw(name + _BLOCKS), raw(name + _SCALES)).swapaxes(1, 2)

  def pieces(name: str):
    if name not in packed:
      return tensors.pieces(name)
    return iter([np.ascontiguousarray(read(name)).reshape(-1)])

  dtypes = {name: tensors.dtypes.get(name, 'bfloat16') for name in shapes}
  return Tensors(shapes, dtypes, read, pieces)


def _shape(folder: pathlib.Path, name: str, shapes: dict) -> tuple[int, int, int]:
  blocks, scales = shapes[name + _BLOCKS], shapes.get(name + _SCALES)
  if len(blocks) != 4 or blocks[3] != 16 or scales != blocks[:3]:
    raise InputError(
      f'{folder}: the shapes of {name}{_BLOCKS} and {name}{_SCALES} do not match; fetch the files again.'
    )
  experts, rows, per_row, _ = blocks
  return experts, 32 * per_row, rows


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Dequantises MXFP4; exact, except below the smallest normal bfloat16.

  Args:
    blocks: uint8 [..., n, 16], two four-bit numbers each.
    scales: uint8 [..., n], exponents plus 127.

  Returns:
    bfloat16 [..., 32·n].
  """
  both = np.stack([blocks & 15, blocks >> 4], -1)  # the lower four bits are the first number
  values = np.ldexp(_VALUES[both].reshape(*blocks.shape[:-1], 32), scales.astype(np.int32)[..., None] - 127)
  return values.astype(jnp.bfloat16).reshape(*scales.shape[:-1], math.prod(scales.shape[-1:]) * 32)
