"""Removal of layers from a GGUF file, whatever its quantisation: tensors octet for octet, metadata made right.

llama.cpp tells layers apart by arrays with an entry for each, by counts, and for some architectures by rules in its code:
a period of layers with a sliding window, or a depth that stands for a certain model. The rules are in the tables below, as
of llama.cpp of October 2026; an architecture that is not in them is refused.
"""

from collections.abc import Callable
import pathlib
import re
from typing import NamedTuple

from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.hf.gguf import source
from elder_jax.hf.gguf import write as writer
from elder_jax.hf.gguf.header import Tensor

# Architecture -> every how many layers one has no window, where the file does not say; 0: layers are alike, or arrays and
# tensors say what they are.
PERIODS = {
  **dict.fromkeys(
    'llama qwen2 qwen3 qwen2moe qwen3moe gemma phi2 phi3 gpt2 gptneox olmo granite granitemoe command-r starcoder2 '
    'stablelm falcon glm4 mistral3 nemotron seed_oss lfm2 bloom mpt internlm2 minicpm ernie4_5 hunyuan-dense'.split(),
    0,
  ),
  **{'gemma2': 2, 'gpt-oss': 2, 'cohere2': 4, 'olmo2': 4, 'gemma3': 6},
}
# Depths by which llama.cpp knows a model and computes another way.
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
  """A GGUF file, or the parts of a split one."""

  path: pathlib.Path
  fields: dict
  raw: dict[str, bytes]
  tensors: list[Tensor]

  @property
  def architecture(self) -> str:
    return str(self.fields.get('general.architecture'))

  @property
  def extras(self) -> int:
    """Layers behind the others that predict further tokens."""
    return self.fields.get(f'{self.architecture}.nextn_predict_layers', 0)

  @property
  def depth(self) -> int:
    """The number of layers, those extra ones apart."""
    return self.fields[f'{self.architecture}.block_count'] - self.extras

  @property
  def alignment(self) -> int:
    return self.fields.get('general.alignment', 32)


def open_file(path: pathlib.Path) -> Opened:
  """Raises InputError where layers of this file cannot be cut."""
  fields, raw, tensors = source.read_raw(path)
  opened = Opened(path, fields, raw, tensors)
  name = opened.architecture
  if not isinstance(fields.get(f'{name}.block_count'), int):
    raise InputError(f'{path}: has no {name}.block_count; is it the file of a language model?')
  if name not in PERIODS:
    raise InputError(
      f'{path}: how llama.cpp tells the layers of the architecture {name} apart is not known here, these are known: '
      f'{", ".join(PERIODS)}.'
    )
  return opened


def cut_fields(opened: Opened, kept: list[int]) -> dict[str, bytes]:
  """The metadata for the layers `kept`, as it stands in a file.

  Raises:
    InputError: something that tells of layers is not known, or cannot be made right.
  """
  name, depth = opened.architecture, opened.depth
  if name in _DEPTHS and _DEPTHS[name](depth) != _DEPTHS[name](len(kept)):
    raise InputError(
      f'{opened.path}: llama.cpp computes {name} with {depth} layers in another way than with {len(kept)}; cut the Hugging '
      'Face folder instead.'
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
  """A field of the architecture as it becomes; None: as it is."""
  name = key.removeprefix(f'{opened.architecture}.')
  if name == 'block_count':
    return writer.uint32(len(entries))
  if name == 'leading_dense_block_count':
    return writer.uint32(sum(l < value for l in kept))
  if name in ('nextn_predict_layers', PATTERN) and not isinstance(value, list):
    return None  # the period becomes an array
  if isinstance(value, list):
    if name in _OTHER_ARRAYS:
      return None
    if name in _PER_LAYER and len(value) == opened.depth + opened.extras:
      return writer.with_entries(opened.raw[key], entries)
  elif not _SUSPECT.search(name) or isinstance(value, float) or value in (0, 1):
    return None
  raise InputError(f'{opened.path}: the field {key}={shown(value, 60)} may tell of layers, and is not known here.')


def window_pattern(opened: Opened) -> list[bool]:
  """Whether each layer has a sliding window; empty where no rule of llama.cpp depends on its number."""
  name = opened.architecture
  given = opened.fields.get(f'{name}.{PATTERN}')
  if isinstance(given, list):
    return []  # cut as any array
  if not PERIODS[name] or (name != 'gemma2' and not opened.fields.get(f'{name}.{_WINDOW}')):
    return []
  return default_pattern(given or PERIODS[name], opened.depth)


def default_pattern(period: int, depth: int) -> list[bool]:
  """llama.cpp's: every period-th layer has no window."""
  return [l % period < period - 1 for l in range(depth)]


def _default(architecture: str, depth: int) -> list[bool]:
  return default_pattern(PERIODS[architecture], depth)


def write(opened: Opened, kept: list[int], path: pathlib.Path, told: Callable[[int, int], None]) -> str:
  """Writes the layers `kept`; the sha256 of the file."""
  entries = [*kept, *range(opened.depth, opened.depth + opened.extras)]
  tensors = [(new, t) for t in opened.tensors if (new := renamed(t.name, entries)) is not None]
  heads = [(new, *writer.take_over(t)[1:]) for new, t in tensors]
  fields = cut_fields(opened, kept)
  return writer.write(path, fields, heads, lambda i: tensors[i][1].data, opened.alignment, told)


def renamed(name: str, entries: list[int]) -> str | None:
  """A tensor's name when only these layers are left; None for one of a layer that goes."""
  found = re.match(r'blk\.(\d+)(\..*)', name)
  if not found:
    return name
  layer = int(found[1])
  return f'blk.{entries.index(layer)}{found[2]}' if layer in entries else None


def check(opened: Opened, kept: list[int], path: pathlib.Path) -> int:
  """The number of tensors, each the original's octet for octet. Raises ValueError for one that is not."""
  entries = [*kept, *range(opened.depth, opened.depth + opened.extras)]
  written = {t.name: t for t in source.read_raw(path)[2]}
  for tensor in opened.tensors:
    if (new := renamed(tensor.name, entries)) is None:
      continue
    there = written.pop(new)
    same = there.shape == tensor.shape and there.tensor_type == tensor.tensor_type
    if not same or there.data.tobytes() != tensor.data.tobytes():
      raise ValueError(f'{path}: the tensor {new} is not what was copied')
  if written:
    raise ValueError(f'{path}: there is a tensor too many, {next(iter(written))}')
  return sum(renamed(t.name, entries) is not None for t in opened.tensors)
