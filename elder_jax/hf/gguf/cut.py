"""Removes layers from a GGUF file of any quantisation: tensors are copied byte for byte, metadata is adjusted.

llama.cpp distinguishes layers by arrays with an entry per layer, by counts, and for some architectures by rules in its
code: a period of layers with a sliding window, or a depth that identifies a certain model. The tables below hold the rules
of llama.cpp of October 2026. Any other architecture raises InputError.
"""

from collections.abc import Callable
import pathlib
import re
from typing import NamedTuple

from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.hf.gguf import default_pattern
from elder_jax.hf.gguf import source
from elder_jax.hf.gguf import write as writer
from elder_jax.hf.gguf.header import Tensor

# Architecture -> the default period: the last layer of each period has no window. 0: all layers are alike, or arrays and
# tensors describe them.
PERIODS = {
  **dict.fromkeys(
    'llama qwen2 qwen3 qwen2moe qwen3moe gemma phi2 phi3 gpt2 gptneox olmo granite granitemoe command-r starcoder2 '
    'stablelm falcon glm4 mistral3 nemotron seed_oss lfm2 bloom mpt internlm2 minicpm ernie4_5 hunyuan-dense'.split(),
    0,
  ),
  **{'gemma2': 2, 'gpt-oss': 2, 'cohere2': 4, 'olmo2': 4, 'gemma3': 6},
}
# Depths that llama.cpp takes as a sign of a certain model, which it then computes in another way.
_DEPTHS: dict[str, Callable[[int], bool]] = {
  'gemma2': lambda depth: depth == 46,
  'gemma3': lambda depth: depth == 62,
  'command-r': lambda depth: depth >= 64,
}
_PER_LAYER = frozenset(
  'attention.head_count attention.head_count_kv attention.sliding_window_pattern feed_forward_length '
  'expert_feed_forward_length expert_used_count attention.recurrent_layers attention.key_length '
  'attention.value_length'.split()
)
_OTHER_ARRAYS = frozenset(['rope.dimension_sections'])
_WINDOW, PATTERN = 'attention.sliding_window', 'attention.sliding_window_pattern'
_SUSPECT = re.compile(r'layers?$|layer_|block|interval|pattern|_step$|every')


class Opened(NamedTuple):
  """A GGUF file, or all parts of a split one."""

  path: pathlib.Path
  fields: dict  # metadata by name
  raw: dict[str, bytes]  # the same as encoded in the file: type and value
  tensors: list[Tensor]

  @property
  def architecture(self) -> str:
    return str(self.fields.get('general.architecture'))

  @property
  def extras(self) -> int:
    """Number of layers after the others that predict further tokens (MTP)."""
    return self.fields.get(f'{self.architecture}.nextn_predict_layers', 0)

  @property
  def depth(self) -> int:
    """The number of layers without the extra ones."""
    return self.fields[f'{self.architecture}.block_count'] - self.extras

  @property
  def alignment(self) -> int:
    """Tensors begin at multiples of this many bytes."""
    return self.fields.get('general.alignment', 32)


def open_file(path: pathlib.Path) -> Opened:
  """Opens a GGUF file. Raises InputError if it cannot be read, or its architecture is not supported for cutting."""
  fields, raw, tensors = source.read_raw(path)
  opened = Opened(path, fields, raw, tensors)
  name = opened.architecture
  if not isinstance(fields.get(f'{name}.block_count'), int):
    raise InputError(f'{path}: has no {name}.block_count; give the file of a language model.')
  if name not in PERIODS:
    raise InputError(
      f'{path}: layers of the architecture {name} cannot be cut; give a file of one of these: {", ".join(PERIODS)}.'
    )
  return opened


def cut_fields(opened: Opened, kept: list[int]) -> dict[str, bytes]:
  """The metadata for the layers `kept`, as encoded in a file.

  Raises:
    InputError: a field that may describe layers is unknown, or llama.cpp would compute the shorter model in another way.
  """
  name, depth = opened.architecture, opened.depth
  if name in _DEPTHS and _DEPTHS[name](depth) != _DEPTHS[name](len(kept)):
    raise InputError(
      f'{opened.path}: llama.cpp computes {name} with {depth} layers in another way than with {len(kept)}; cut the Hugging '
      'Face folder of this model instead.'
    )
  raw, entries = dict(opened.raw), [*kept, *range(depth, depth + opened.extras)]
  for key, value in opened.fields.items():
    if key.startswith('split.'):
      del raw[key]
    elif key.startswith(f'{name}.') and (new := _changed(opened, key, value, kept, entries)) is not None:
      raw[key] = new
  pattern = window_pattern(opened)
  if pattern and (left := [pattern[l] for l in kept]) != _default(name, len(kept)):
    raw[f'{name}.{PATTERN}'] = writer.flags([*left, *[False] * opened.extras])
  return raw


def _changed(opened: Opened, key: str, value, kept: list[int], entries: list[int]) -> bytes | None:
  """The new encoded value of a field of the architecture; None if it does not change."""
  name = key.removeprefix(f'{opened.architecture}.')
  if name == 'block_count':
    return writer.uint32(len(entries))
  if name == 'leading_dense_block_count':
    return writer.uint32(sum(l < value for l in kept))
  if name in ('nextn_predict_layers', PATTERN) and not isinstance(value, list):
    return None  # cut_fields writes an array where it is needed
  if isinstance(value, list):
    if name in _OTHER_ARRAYS:
      return None
    if name in _PER_LAYER and len(value) == opened.depth + opened.extras:
      return writer.with_entries(opened.raw[key], entries)
  elif not _SUSPECT.search(name) or isinstance(value, float) or value in (0, 1):
    return None
  raise InputError(
    f'{opened.path}: the unknown field {key}={shown(value, 60)} may describe layers; cut the Hugging Face folder instead.'
  )


def window_pattern(opened: Opened) -> list[bool]:
  """Whether each layer has a sliding window; empty if no rule of llama.cpp depends on the layer's number."""
  name = opened.architecture
  given = opened.fields.get(f'{name}.{PATTERN}')
  if isinstance(given, list):
    return []  # _changed cuts it like any array
  if not PERIODS[name] or (name != 'gemma2' and not opened.fields.get(f'{name}.{_WINDOW}')):
    return []
  return default_pattern(given or PERIODS[name], opened.depth)


def _default(architecture: str, depth: int) -> list[bool]:
  return default_pattern(PERIODS[architecture], depth)


def write(opened: Opened, kept: list[int], path: pathlib.Path, progress: Callable[[int, int], None]) -> str:
  """Writes the layers `kept` and returns the sha256 of the file; `progress` as in write.write."""
  entries = [*kept, *range(opened.depth, opened.depth + opened.extras)]
  tensors = [(new, t) for t in opened.tensors if (new := renamed(t.name, entries)) is not None]
  heads = [(new, *writer.take_over(t)[1:]) for new, t in tensors]
  fields = cut_fields(opened, kept)
  return writer.write(path, fields, heads, lambda i: tensors[i][1].data, opened.alignment, progress)


def renamed(name: str, entries: list[int]) -> str | None:
  """A tensor's name when only the layers `entries` remain; None if its layer is removed."""
  found = re.match(r'blk\.(\d+)(\..*)', name)
  if not found:
    return name
  layer = int(found[1])
  return f'blk.{entries.index(layer)}{found[2]}' if layer in entries else None


def check(opened: Opened, kept: list[int], path: pathlib.Path) -> int:
  """Compares the tensors of the new file with the original's, byte for byte, and returns their number.

  Raises:
    ValueError: a tensor differs, or is not in the original.
  """
  entries = [*kept, *range(opened.depth, opened.depth + opened.extras)]
  written = {t.name: t for t in source.read_raw(path)[2]}
  for tensor in opened.tensors:
    if (new := renamed(tensor.name, entries)) is None:
      continue
    copy = written.pop(new)
    same = copy.shape == tensor.shape and copy.tensor_type == tensor.tensor_type
    if not same or copy.data.tobytes() != tensor.data.tobytes():
      raise ValueError(f'{path}: the tensor {new} differs from the original')
  if written:
    raise ValueError(f'{path}: the tensor {next(iter(written))} is not in the original')
  return sum(renamed(t.name, entries) is not None for t in opened.tensors)
