"""A model as a GGUF file: metadata and tokenizer of the file that it was made from, tensors in a type of choice.

A tensor that was not changed keeps the octets of that file, where the file's own types are asked for.
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
from elder_jax.hf.gguf import source as gguf_source
from elder_jax.hf.gguf import write as writer
from elder_jax.hf.gguf.header import Tensor
from elder_jax.hf.source import Source

Type = gguf.GGMLQuantizationType
# Choice -> (type of matrices, llama.cpp's number of it for a whole file).
TYPES = {'f32': (Type.F32, 0), 'f16': (Type.F16, 1), 'bf16': (Type.BF16, 32), 'q8_0': (Type.Q8_0, 7)}


class Exported(NamedTuple):
  """What `export` wrote.

  sha256: of the file.
  kinds: {type: number of tensors}.
  untouched: tensors that kept their octets.
  replaced: names of types that cannot be written, in place of which Q8_0 is.
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
  told: Callable[[int, int], None] = lambda done, of: None,
) -> Exported:
  """Writes the file and reads its head back.

  Args:
    source: the model, of a family that llama.cpp knows.
    like: a GGUF file of the model that it was made from.
    kept: the layers of that file that it still has; None: not known, so that no tensor is seen to be untouched.
    kind: one of TYPES, or LIKE.
    told: of write.write.

  Raises:
    InputError: the two are not of one kind, or the result would be read as another model.
  """
  family = source.family
  if not hasattr(family, 'GGUF_ARCHITECTURE'):
    raise InputError('model', source.name, f'GGUF is not written for model_type {source.config["model_type"]}.')
  opened = cut.open_file(like)
  if opened.architecture != family.GGUF_ARCHITECTURE:
    raise InputError(
      'like',
      like,
      f'is of the architecture {opened.architecture}, the model of {family.GGUF_ARCHITECTURE}; give its own.',
    )
  if kept is not None and kept and kept[-1] >= opened.depth:
    raise InputError('like', like, f'has {opened.depth} layers, fewer than the model was made from; give its own.')
  names = {_name(family, name): name for name in source.shapes}
  theirs = {t.name: t for t in opened.tensors}
  derived = getattr(family, 'GGUF_DERIVED', None)
  made = _Tensors(source, theirs, kept, kind)
  heads = [made.head(ours, names[ours]) for ours in names]
  if derived in theirs:
    heads.append(writer.take_over(theirs[derived]))

  def data_of(i: int) -> np.ndarray:
    name = heads[i][0]
    return theirs[name].data if name == derived else made.data(name, names[name])

  fields = _fields(opened, source, kind)
  sha256 = writer.write(path, fields, heads, data_of, opened.alignment, told)
  _check(source, path)
  counts = {k.name: sum(head[2] == k for head in heads) for k in {head[2] for head in heads}}
  return Exported(sha256, dict(sorted(counts.items())), len(made.untouched), sorted(made.replaced))


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
        self.untouched.add(name)  # 1 + (w − 1) need not be w
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
    """The tensor that this one was, or of which at least the type is known."""
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
  except NotImplementedError:  # nothing unfinished here: what the gguf package raises for a type it cannot write
    return False
  return True


def _name(family, hf_name: str) -> str:
  """GGUF's name of a tensor."""
  found = re.search(r'\.(\d+)\.', hf_name)
  layer = found[1] if found else ''
  template = hf_name if not found else f'{hf_name[: found.start()]}.{{l}}.{hf_name[found.end() :]}'
  return family.GGUF_NAMES[template].format(l=layer)


def _fields(opened: cut.Opened, source: Source, kind: str) -> dict[str, bytes]:
  """The metadata of the file, for as many layers as the model has."""
  name = opened.architecture
  fields = {key: raw for key, raw in opened.raw.items() if not key.startswith('split.')}
  fields[f'{name}.block_count'] = writer.uint32(source.num_layers)
  pattern = f'{name}.{cut.PATTERN}'
  windows = [bool(window) for window in source.spec.window_L]
  fields.pop(pattern, None)
  if cut.PERIODS[name] and windows and windows != cut.default_pattern(cut.PERIODS[name], source.num_layers):
    fields[pattern] = writer.flags(windows)
  if kind != LIKE:
    fields['general.file_type'] = writer.uint32(TYPES[kind][1])
    fields['general.quantization_version'] = writer.uint32(2)
  return fields


def _check(source: Source, path: pathlib.Path):
  """Raises InputError where the file would be read as another model than the folder."""
  spec, num_layers = gguf_source.spec_of(path)
  if (spec, num_layers) != (source.spec, source.num_layers):
    raise InputError(
      f'{path}: llama.cpp would read another model than the folder ({num_layers} layers); is --like a file of the model '
      'that the folder was made from?'
    )
