"""Writes a model as a GGUF file, with the metadata and tokenizer of the file that it was made from.

The user chooses the type of the tensors. With LIKE, unchanged tensors are copied from that file byte for byte.
"""

from collections.abc import Callable
import pathlib
import re
from typing import NamedTuple

import gguf
import numpy as np

from elder_jax.errors import InputError
from elder_jax.hf.gguf import LIKE
from elder_jax.hf.gguf import cut
from elder_jax.hf.gguf import default_pattern
from elder_jax.hf.gguf import source as gguf_source
from elder_jax.hf.gguf import write as writer
from elder_jax.hf.gguf.header import Tensor
from elder_jax.hf.source import Source

Type = gguf.GGMLQuantizationType
# Choice -> (type of the matrices, llama.cpp's general.file_type).
TYPES = {'f32': (Type.F32, 0), 'f16': (Type.F16, 1), 'bf16': (Type.BF16, 32), 'q8_0': (Type.Q8_0, 7)}


class Exported(NamedTuple):
  """What `export` wrote.

  sha256: of the file.
  kinds: {type: number of tensors}.
  untouched: number of tensors that were copied byte for byte.
  replaced: names of types that cannot be written; Q8_0 was written instead.
  """

  sha256: str
  kinds: dict[str, int]
  untouched: int
  replaced: list[str]


def export(
  source: Source,
  like: pathlib.Path,
  kept: list[int] | None,
  kind: str,
  path: pathlib.Path,
  progress: Callable[[int, int], None] = lambda done, of: None,
) -> Exported:
  """Writes the file, and reads its header back to check it.

  Args:
    source: the model.
    like: a GGUF file of the model that it was made from.
    kept: the layers of that file that it still has. None: unknown, so no tensor is copied.
    kind: one of TYPES, or LIKE.
    path: of the new file.
    progress: called with (bytes written, bytes in total).

  Raises:
    InputError: the family or `like` does not fit, or llama.cpp would read another model.
  """
  family = source.family
  if not hasattr(family, 'GGUF_ARCHITECTURE'):
    raise InputError(
      'model',
      source.name,
      f'GGUF is not supported for model_type {source.config["model_type"]}; convert the folder with llama.cpp.',
    )
  opened = cut.open_file(like)
  if opened.architecture != family.GGUF_ARCHITECTURE:
    raise InputError(
      'like',
      like,
      f'has the architecture {opened.architecture}, the model has {family.GGUF_ARCHITECTURE}; give the file that the '
      'model was made from.',
    )
  if kept is not None and kept and kept[-1] >= opened.depth:
    raise InputError(
      'like', like, f'has only {opened.depth} layers; give the file that the model was made from, with all its layers.'
    )
  names = {_name(family, name): name for name in source.shapes}
  theirs = {t.name: t for t in opened.tensors}
  derived = getattr(family, 'GGUF_DERIVED', None)
  tensors = _Tensors(source, theirs, kept, kind)
  heads = [tensors.head(ours, names[ours]) for ours in names]
  if derived in theirs:
    heads.append(writer.take_over(theirs[derived]))

  def data_of(i: int) -> np.ndarray:
    name = heads[i][0]
    return theirs[name].data if name == derived else tensors.data(name, names[name])

  fields = _fields(opened, source, kind)
  sha256 = writer.write(path, fields, heads, data_of, opened.alignment, progress)
  _check(source, path)
  counts = {k.name: sum(head[2] == k for head in heads) for k in {head[2] for head in heads}}
  return Exported(sha256, dict(sorted(counts.items())), len(tensors.untouched), sorted(tensors.replaced))


class _Tensors:
  """The tensors of the new file, by GGUF name and Hugging Face name."""

  def __init__(self, source: Source, theirs: dict[str, Tensor], kept: list[int] | None, kind: str):
    self._source, self._theirs, self._kept, self._kind = source, theirs, kept, kind
    self.untouched: set[str] = set()
    self.replaced: set[str] = set()

  def head(self, name: str, hf_name: str) -> tuple[str, tuple[int, ...], Type]:
    shape = self._source.shapes[hf_name][::-1]  # GGUF: fastest axis first
    return name, shape, self._type(name, hf_name, shape)

  def data(self, name: str, hf_name: str) -> np.ndarray:
    if name in self.untouched:
      return self._before(name).data
    shape = self._source.shapes[hf_name][::-1]
    kind = self._type(name, hf_name, shape)
    weight = np.ascontiguousarray(self._weight(hf_name))
    return weight if kind == Type.F32 else gguf.quantize(weight, kind)

  def _type(self, name: str, hf_name: str, shape: tuple[int, ...]) -> Type:
    before = self._before(name)
    if len(shape) < 2:  # llama.cpp reads norms and biases as F32 only
      if before is not None and before.tensor_type == Type.F32 and self._is_untouched(before, hf_name):
        self.untouched.add(name)  # rewritten, Gemma's norms could change: 1 + (w − 1) is not always w
      return Type.F32
    if self._kind != LIKE:
      kind = TYPES[self._kind][0]
      return kind if shape[0] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16
    if before is None:
      return Type.Q8_0 if shape[0] % 32 == 0 else Type.F16
    if name in self.untouched or self._is_untouched(before, hf_name):
      self.untouched.add(name)
      return before.tensor_type
    if _can_write(before.tensor_type):
      return before.tensor_type
    self.replaced.add(before.tensor_type.name)
    return Type.Q8_0 if shape[0] % 32 == 0 else Type.F16

  def _before(self, name: str) -> Tensor | None:
    """The tensor of `like` that this one was made from. With unknown `kept`, the one of the same name, for its type."""
    found = re.match(r'blk\.(\d+)(\..*)', name)
    if not found or self._kept is None:
      return self._theirs.get(name)
    return self._theirs.get(f'blk.{self._kept[int(found[1])]}{found[2]}')

  def _is_untouched(self, before: Tensor, hf_name: str) -> bool:
    if self._kept is None or before.shape != self._source.shapes[hf_name][::-1]:
      return False
    now = self._source.read(hf_name)
    was = gguf.dequantize(before.data, before.tensor_type).reshape(now.shape)
    return np.array_equal(self._source.family.from_gguf(hf_name, was, self._source.config).astype(now.dtype), now)

  def _weight(self, hf_name: str) -> np.ndarray:
    weight = np.asarray(self._source.read(hf_name)).astype(np.float32)
    return self._source.family.to_gguf(hf_name, weight, self._source.config)


def _can_write(kind: Type) -> bool:
  try:
    gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
  except NotImplementedError:  # raised by the gguf package for a type that it cannot write
    return False
  return True


def _name(family, hf_name: str) -> str:
  """The GGUF name of a Hugging Face tensor."""
  found = re.search(r'\.(\d+)\.', hf_name)
  layer = found[1] if found else ''
  template = hf_name if not found else f'{hf_name[: found.start()]}.{{l}}.{hf_name[found.end() :]}'
  return family.GGUF_NAMES[template].format(l=layer)


def _fields(opened: cut.Opened, source: Source, kind: str) -> dict[str, bytes]:
  """The metadata of the new file, as encoded, for the model's number of layers."""
  name = opened.architecture
  fields = {key: raw for key, raw in opened.raw.items() if not key.startswith('split.')}
  fields[f'{name}.block_count'] = writer.uint32(source.num_layers)
  pattern = f'{name}.{cut.PATTERN}'
  windows = [bool(window) for window in source.spec.window_L]
  fields.pop(pattern, None)
  if cut.PERIODS[name] and windows and windows != default_pattern(cut.PERIODS[name], source.num_layers):
    fields[pattern] = writer.flags(windows)
  if kind != LIKE:
    fields['general.file_type'] = writer.uint32(TYPES[kind][1])
    fields['general.quantization_version'] = writer.uint32(2)
  return fields


def _check(source: Source, path: pathlib.Path):
  """Raises InputError if the file describes another model than the folder."""
  spec, num_layers = gguf_source.spec_of(path)
  if (spec, num_layers) != (source.spec, source.num_layers):
    raise InputError(
      f'{path}: llama.cpp would read another model than the folder ({num_layers} layers); give as --like a file of the '
      'model that the folder was made from.'
    )
