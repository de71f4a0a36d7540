"""Hugging Face checkpoints in and out: the engine behind the families' weight tables.

`open_source` looks at a folder, a hub id or a GGUF file and reads headers only; `load` checks every name and shape, then
reads tensor by tensor; `save` writes a Hugging Face folder. Nothing here unpickles or runs code from a checkpoint.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from elder_jax import log as log_lib
from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.errors import user_path
from elder_jax.hf import families
from elder_jax.hf import folder as model_folder
from elder_jax.hf import safetensors_files
from elder_jax.hf.gguf import source as gguf_source
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Spec


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that was opened but not read."""

  name: str  # as the user called it
  files: pathlib.Path  # folder with config.json, tokenizer and the like
  config: dict
  spec: Spec
  num_layers: int
  shapes: dict[str, tuple[int, ...]]  # by Hugging Face name
  dtypes: dict[str, str]  # the same, of safetensors_files.DTYPES
  read: Callable[[str], np.ndarray]
  pieces: Callable[[str], Iterator[np.ndarray]]  # flat; one holds until the next but one

  @property
  def is_gguf(self) -> bool:
    return model_folder.is_gguf(self.name)

  @property
  def dtype(self) -> str:
    """That of all tensors; float32 where they differ."""
    kinds = set(self.dtypes.values())
    return kinds.pop() if len(kinds) == 1 else 'float32'

  @property
  def context_length(self) -> int | None:
    """Positions that the model has for a prompt and what follows it; None where config.json does not limit them."""
    limits = (self.config.get(name) for name in ('max_position_embeddings', 'n_positions', 'n_ctx'))
    return self.spec.num_positions or next((n for n in limits if isinstance(n, int) and n > 0), None)

  @property
  def family(self):
    return families.FAMILIES[self.config['model_type']]


def open_source(model: str, scratch: pathlib.Path) -> Source:
  """Opens `--model`. What a GGUF file holds besides weights is written as Hugging Face files into `scratch`."""
  if not model:
    raise InputError('--model is missing: give a Hugging Face folder, a hub id or a .gguf file.')
  if model_folder.is_gguf(model):
    path = user_path(model)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name too long or not to be reached
      raise InputError(f'--model={model}: there is no such file; check the path.')
    config, shapes, read = gguf_source.open_gguf(path, scratch)
    files, dtypes = scratch, dict.fromkeys(shapes, 'float32')
    pieces = lambda name: iter([read(name)])
  else:
    files = model_folder.find('--model', model)
    config = safetensors_files.read_json(files / 'config.json')
    shapes, dtypes, read, pieces = safetensors_files.open_folder(files)
  _check_is_lm(model, config)
  spec, num_layers = architecture(model, config)
  source = _with_our_names(Source(model, files, config, spec, num_layers, shapes, dtypes, read, pieces))
  return _only_weights(_with_own_head(source))


def _check_is_lm(model: str, config: dict):
  heads = config.get('architectures')
  for head in heads if isinstance(heads, list) else []:
    if re.search(r'For(?!CausalLM)\w+$', str(head)):
      raise InputError(
        f'--model={model}: is a {head} by its config.json, which has no head for the next token; give the language model '
        '(…ForCausalLM) that it was made from.'
      )


def read_config(model: str) -> dict:
  """config.json of a folder or of a hub id, from which nothing else is fetched."""
  return safetensors_files.read_json(model_folder.find('--model', model, 'config') / 'config.json')


def architecture(model: str, config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json; model: what to call it in an error."""
  model_type = config.get('model_type')
  if not isinstance(model_type, str) or model_type not in families.FAMILIES:
    raise InputError(
      f'--model={model}: model_type {shown(model_type)} is not supported, these are: {", ".join(families.FAMILIES)}.'
    )
  return families.FAMILIES[model_type].spec_from_config(config)


def _with_our_names(source: Source) -> Source:
  """Names with the prefix of the whole model left out, or twice, are read as transformers does: h.0 is transformer.h.0."""
  templates = source.family.WEIGHTS
  known = re.compile('|'.join(re.escape(n).replace(re.escape('{l}'), r'\d+') for n in templates))
  prefix = next(iter(templates)).partition('.')[0] + '.'

  def ours(name: str) -> str:
    ways = name, prefix + name, name.removeprefix(prefix)
    return next((way for way in ways if known.fullmatch(way)), name)

  theirs = {ours(name): name for name in source.shapes}
  head, embed = _head_and_embedding(source)
  if source.spec.tied and head in theirs and embed not in theirs:  # one of the two is enough
    theirs[embed] = theirs.pop(head)
  if len(theirs) < len(source.shapes) or all(a == b for a, b in theirs.items()):
    return source  # what is there twice is told as a tensor too many
  by_our_names = lambda table: {ours: table[name] for ours, name in theirs.items()}
  return dataclasses.replace(
    source,
    shapes=by_our_names(source.shapes),
    dtypes=by_our_names(source.dtypes),
    read=lambda name: source.read(theirs[name]),
    pieces=lambda name: source.pieces(theirs[name]),
  )


def _head_and_embedding(source: Source) -> tuple[str, str]:
  """Their names in the family's files."""
  entries = [(name, entry[0]) for name, entry in source.family.WEIGHTS.items() if entry]
  return tuple(next(name for name, path in entries if path == ours) for ours in ('head', 'embed'))


def _with_own_head(source: Source) -> Source:
  """A head in the files that is not the embedding is kept, whatever tie_word_embeddings says: so reads transformers 5."""
  head, embed = _head_and_embedding(source)
  if not source.spec.tied or not {head, embed} <= source.shapes.keys() or _equal(source, head, embed):
    return source
  log_lib.say(
    f'--model={source.name}: tie_word_embeddings is true, but {head} is not {embed}; it is kept, and the export says false'
  )
  return dataclasses.replace(
    source,
    config=source.config | {'tie_word_embeddings': False},
    spec=dataclasses.replace(source.spec, tied=False),
  )


def _equal(source: Source, a: str, b: str) -> bool:
  """Whether two matrices have the same values, in whatever types."""
  if source.shapes[a] != source.shapes[b]:
    return False
  for name in (a, b):
    _check_dtype(source, name)
  x, y = source.read(a), source.read(b)
  rows = 1024  # at a time
  wide = lambda part: part.astype(np.float32)
  return all(np.array_equal(wide(x[i : i + rows]), wide(y[i : i + rows])) for i in range(0, len(x), rows))


def _only_weights(source: Source) -> Source:
  """Checked, and without the buffers, whose type is of no interest."""
  _check_names_and_shapes(source)
  rows = _rows(source.family, source.spec, source.num_layers)
  for row in rows:
    _check_dtype(source, row.name)
  return dataclasses.replace(
    source,
    shapes={row.name: source.shapes[row.name] for row in rows},
    dtypes={row.name: source.dtypes[row.name] for row in rows},
  )


def _check_dtype(source: Source, name: str):
  if (dtype := source.dtypes[name]) in safetensors_files.DTYPES.values():
    return
  if dtype == 'F64':
    mend = 'is in float64; convert the checkpoint to float32 or bfloat16'
  else:
    mend = f'is of type {dtype}; quantised weights are not read, use the unquantised checkpoint'
  raise InputError(f'--model={source.name}: the tensor {name} {mend}.')


# ---- the weight table, both ways ----


@dataclasses.dataclass(frozen=True)
class _Part:
  """A slice of one of our parameters, and the axes that it has in a Hugging Face tensor."""

  path: str  # in Decoder
  shape: tuple[int, ...]  # as Hugging Face has it
  folded: tuple[int, ...]  # the shape with every letter an axis of its own; '*' is one of size 1
  order: tuple[int, ...]  # of the letters in ours


@dataclasses.dataclass(frozen=True)
class _Row:
  """One Hugging Face tensor and the slices of ours that it is: one, or several that are fused."""

  template: str  # the name, with {l} for the layer
  layer: int | None  # index on our leading axis
  parts: tuple[_Part, ...]
  dim: int | None  # of the tensor, in which the parts are fused: '+', one after the other, or '*', in turns
  star: int | None  # '*': the axis of the folded shape along which they take turns

  @property
  def name(self) -> str:
    return self.template.format(l=self.layer)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(
      sum(part.shape[j] for part in self.parts) if j == self.dim else n for j, n in enumerate(self.parts[0].shape)
    )

  def to_ours(self, tensor) -> list:
    """Our slices, in the order of `parts`."""
    if self.dim is None:
      pieces = [tensor]
    elif self.star is None:
      pieces = np.split(tensor, np.cumsum([part.shape[self.dim] for part in self.parts])[:-1], self.dim)
    else:
      folded = self.parts[0].folded
      pieces = np.split(
        tensor.reshape(*folded[: self.star], len(self.parts), *folded[self.star + 1 :]), len(self.parts), self.star
      )
    return [
      np.reshape(piece, [n for i, n in enumerate(part.folded) if i != self.star]).transpose(part.order)
      for part, piece in zip(self.parts, pieces)
    ]

  def to_hf(self, ours: list):
    pieces = [a.transpose(np.argsort(part.order)) for part, a in zip(self.parts, ours)]
    shapes = [part.shape if self.star is None else part.folded for part in self.parts]
    pieces = [piece.reshape(shape) for piece, shape in zip(pieces, shapes)]
    if self.dim is None:
      return pieces[0]
    return np.concatenate(pieces, self.dim if self.star is None else self.star).reshape(self.shape)


def _row(template: str, layer: int | None, entry, sizes: dict[str, int]) -> _Row:
  """A row of a family's table. A rule is 'HF->ours', as families/llama.py says; fused parts have '+' or '*' in it."""
  parts, size = [], sizes | {'*': 1}
  for path, rule in (entry,) if isinstance(entry[0], str) else entry:
    theirs, ours = rule.replace('+', '').split('->')
    dims, letters = theirs.split(','), theirs.replace(',', '').replace('*', '')
    shape, folded = (math.prod(size[a] for a in dim) for dim in dims), (size[a] for a in theirs.replace(',', ''))
    parts.append(_Part(path, tuple(shape), tuple(folded), tuple(letters.index(a) for a in ours)))
  dim = next((j for j, text in enumerate(rule.split(',')) if {'+', '*'} & set(text)), None)
  return _Row(template, layer, tuple(parts), dim, theirs.replace(',', '').index('*') if '*' in theirs else None)


@functools.lru_cache(maxsize=8)
def abstract(spec: Spec, num_layers: int) -> Decoder:
  """The Decoder of this spec without its arrays; not to be written to."""
  return jax.eval_shape(lambda: Decoder(spec, num_layers, jax.random.key(0)))


def _rows(family, spec: Spec, num_layers: int) -> list[_Row]:
  """All tensors of the checkpoint, in file order; layers expanded, what the Decoder of this spec lacks left out."""
  sizes, model, rows = spec.sizes(num_layers), abstract(spec, num_layers), []
  for name, entry in family.WEIGHTS.items():
    if entry is None or get(model, entry[0] if isinstance(entry[0], str) else entry[0][0]) is None:
      continue
    rows += [_row(name, l, entry, sizes) for l in (range(num_layers) if '{l}' in name else [None])]
  embeds = ('embed', 'positions')
  place = lambda row: row.layer if row.layer is not None else -1 if row.parts[0].path in embeds else num_layers
  return sorted(rows, key=place)


def _ignored(family, spec: Spec) -> re.Pattern:
  names = [n for n, e in family.WEIGHTS.items() if e is None or (e[0] == 'head' and spec.tied)]
  return re.compile('|'.join(re.escape(n).replace(re.escape('{l}'), r'\d+') for n in names))


def _check_names_and_shapes(source: Source):
  where = f'--model={source.name}'
  if source.num_layers > len(source.shapes):  # before a table of so many layers is made
    raise InputError(
      f'{where}: config.json has num_hidden_layers={source.num_layers}, but there are only {len(source.shapes)} '
      'tensors; use the config.json of these weights.'
    )
  rows = {row.name: row for row in _rows(source.family, source.spec, source.num_layers)}
  if (missing := next((n for n in rows if n not in source.shapes), None)) is not None:
    raise InputError(
      f'{where}: the tensor {missing} is missing; config.json is of another model, or a file with weights is not there.'
    )
  ignored = _ignored(source.family, source.spec)
  if (extra := next((n for n in source.shapes if n not in rows and not ignored.fullmatch(n)), None)) is not None:
    for part, what in (('lora_', 'LoRA factors that were not merged'), ('qweight', 'weights quantised by GPTQ or AWQ')):
      if part in extra:
        raise InputError(
          f'{where}: the tensor {extra} has no place in the model: these are {what}; give the plain model.'
        )
    raise InputError(
      f'{where}: the tensor {extra} has no place in a {source.config["model_type"]} model of this config.json; use the '
      'config.json of these weights, or a checkpoint without the tensor.'
    )
  for name, row in rows.items():
    if source.shapes[name] != row.shape:
      keys = ' by its vocab_size and width' if row.parts[0].path in ('embed', 'head') else ''
      raise InputError(
        f'{where}: the tensor {name} has shape {list(source.shapes[name])}, config.json asks for {list(row.shape)}{keys}; '
        'use the config.json of these weights.'
      )


def get(model: Decoder, path: str):
  """The nnx.Param at a dotted path; None where the Decoder has none."""
  for name in path.split('.'):
    model = getattr(model, name, None)
  return model


def load(source: Source, dtype: str, shardings=None) -> Decoder:
  """Reads the weights tensor by tensor into arrays of `dtype` (gates: float32 ones), each straight to its place.

  A device's slice of a tensor is all that is read for it, so that of several hosts each reads its own byte ranges (of
  GGUF, whole tensors). Beside the arrays themselves the host holds a few copies of one tensor.

  Args:
    shardings: a Decoder of shardings (sharding.for_model), or None for the default device.
  """
  model = jax.eval_shape(lambda: Decoder(source.spec, source.num_layers, jax.random.key(0)))
  where = lambda path: None if shardings is None else get(shardings, path).get_value()
  stacks = {}
  for row in _rows(source.family, source.spec, source.num_layers):
    preemption.check()
    for part, piece in zip(row.parts, row.to_ours(source.read(row.name))):
      place, check = where(part.path), functools.partial(_check_finite, source=source, row=row)
      if row.layer is None:
        stacks[part.path] = _on_devices(piece, dtype, place, check)
        continue
      if part.path not in stacks:
        stacks[part.path] = _zeros((source.num_layers, *piece.shape), dtype, place)
      slice_place = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
      array = _on_devices(piece, dtype, slice_place, check)
      stacks[part.path] = _put(stacks[part.path], array, np.int32(row.layer), place)
  for path, array in stacks.items():
    get(model, path).set_value(array)
  ones_L = np.ones(source.num_layers, np.float32)
  model.gate_L.set_value(_on_devices(ones_L, 'float32', where('gate_L'), lambda _: None))
  return model


def _on_devices(tensor: np.ndarray, dtype: str, place, check: Callable) -> jax.Array:
  """The tensor, which may be a view of a file, on the devices of `place`: each slice is read, checked and copied alone.

  Slices are copied as they lie in memory and turned on the device: a host takes ten times as long for a transposed copy.
  """
  as_stored = _order([-stride for stride in tensor.strides])
  stored, back = tensor.transpose(as_stored), _order(as_stored)

  def part(index):
    check(stored[index])
    return np.array(stored[index], jnp.dtype(dtype), order='C')  # a copy: an array on a CPU may go on using this memory

  if place is None:
    return _turn(jax.device_put(part(...)), back, None)
  axes = [*place.spec, *[None] * (tensor.ndim - len(place.spec))]
  stored_place = NamedSharding(place.mesh, PartitionSpec(*(axes[a] for a in as_stored)))
  return _turn(jax.make_array_from_callback(stored.shape, stored_place, part), back, place)


def _order(keys) -> tuple[int, ...]:
  """What sorts the keys; of a permutation, its inverse."""
  return tuple(int(a) for a in np.argsort(keys, kind='stable'))


def _turn(array, axes: tuple[int, ...], place):
  return array if axes == tuple(range(len(axes))) else _turned(array, axes, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _turned(array, axes: tuple[int, ...], place):
  turned = array.transpose(axes)
  return turned if place is None else jax.lax.with_sharding_constraint(turned, place)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, place):
  zeros = jnp.zeros(shape, dtype)
  return zeros if place is None else jax.lax.with_sharding_constraint(zeros, place)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(stack, piece, layer, place):
  stack = jax.lax.dynamic_update_index_in_dim(stack, piece, layer, 0)
  return stack if place is None else jax.lax.with_sharding_constraint(stack, place)


def _check_finite(tensor: np.ndarray, source: Source, row: _Row):
  if not safetensors_files.finite(tensor):
    raise InputError(
      f'--model={source.name}: the tensor {row.name} holds NaN or infinite values; use another copy of the checkpoint.'
    )


# Row of a family's table -> the tensor as Hugging Face has it, in pieces.
PiecesOf = Callable[[_Row], Iterable[np.ndarray]]


def from_model(model: Decoder) -> PiecesOf:
  def pieces(row: _Row):
    preemption.check()
    ours = []
    for part in row.parts:
      array = get(model, part.path)[...]
      array = array if row.layer is None else array[row.layer]
      # Turned on the device, so that what to_hf turns back lies in the file's order already.
      theirs = hosts.to_host(_turn(array, _order(part.order), None))
      ours.append(theirs.transpose(part.order))
    tensor = row.to_hf(ours)
    if not safetensors_files.finite(tensor):
      raise InputError(f'the tensor {row.name} of the pruned model holds NaN or infinite values; nothing is exported.')
    yield tensor

  return pieces


def from_source(source: Source, kept: list[int]) -> PiecesOf:
  """The source's own tensors, so that a model of which layers just go is never in memory."""
  own = _source_rows(source, kept)

  def pieces(row: _Row):
    for piece in source.pieces(own(row).name):
      preemption.check_alone()
      _check_finite(piece, source, own(row))
      yield piece

  return pieces


def take_part(pieces_of: PiecesOf, source: Source, kept: list[int]):
  """What a process does while another is in `save`: devices give their parts of each tensor."""
  for row in _rows(source.family, source.spec.with_layers(kept), len(kept)):
    for _ in pieces_of(row):
      pass


def _source_rows(source: Source, kept: list[int]) -> Callable[[_Row], _Row]:
  """From a row of the model that has the layers `kept` to the same tensor's in the source."""
  rows = {(row.template, row.layer): row for row in _rows(source.family, source.spec, source.num_layers)}
  return lambda row: rows[row.template, None if row.layer is None else kept[row.layer]]


def save(
  pieces_of: PiecesOf,
  source: Source,
  kept: list[int],
  folder: pathlib.Path,
  dtype: str,
  shard_bytes: int,
  tokenizer: pathlib.Path | None = None,
) -> dict:
  """Writes source's layers `kept` as a Hugging Face folder; `folder` must exist and is the caller's to rename.

  config.json is the source's with the depth changed and without auto_map, since transformers has the code of every family;
  the small files are copied byte for byte. The host holds one tensor at a time.

  Args:
    pieces_of: from_model or from_source.
    dtype: of the tensors written; empty: each has its source's own.
    tokenizer: the folder of another tokenizer than the source's, if any (model_folder.small_files).

  Returns:
    {file name: sha256} of the files with tensors.
  """
  config = pruned_config(source.family, source.config, kept, dtype)
  config.pop('auto_map', None)
  (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
  model_folder.copy(model_folder.small_files(source.files, tokenizer), folder)

  rows = _rows(source.family, source.spec.with_layers(kept), len(kept))
  own = _source_rows(source, kept)
  dtypes = {row.name: dtype or source.dtypes[own(row).name] for row in rows}
  size = lambda row: math.prod(row.shape) * jnp.dtype(dtypes[row.name]).itemsize
  shards: list[list[_Row]] = [[]]
  for row in rows:
    if shards[-1] and sum(map(size, shards[-1])) + size(row) > shard_bytes:
      shards.append([])
    shards[-1].append(row)
  names = [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
  if len(shards) == 1:
    names = ['model.safetensors']
  hashes = {}
  for name, shard in zip(names, shards):
    tensors = [(row.name, row.shape, dtypes[row.name]) for row in shard]
    hashes[name] = safetensors_files.write(folder / name, tensors, lambda i, shard=shard: pieces_of(shard[i]))
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(map(size, rows))},
      'weight_map': {row.name: name for name, shard in zip(names, shards) for row in shard},
    }
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
  return hashes


def _rope_for_transformers_4(family, config: dict) -> dict:
  """What version 5 has in rope_parameters alone, where version 4 looks for it; it would take its default unasked."""
  rope = config.get('rope_parameters')
  if not isinstance(rope, dict):
    return {}
  theta, part = getattr(family, 'ROPE_KEYS', ('rope_theta', 'partial_rotary_factor'))
  old, full = {}, rope.get('full_attention', rope)
  if 'sliding_attention' in rope:
    old['rope_local_base_freq'] = rope['sliding_attention'].get('rope_theta')
  old |= {theta: full.get('rope_theta'), part: full.get('partial_rotary_factor')}
  if full.get('rope_type', 'default') != 'default':
    old['rope_scaling'] = {k: v for k, v in full.items() if k not in ('rope_theta', 'partial_rotary_factor')}
  return {key: value for key, value in old.items() if value is not None and config.get(key) is None}


def pruned_config(family, config: dict, kept: list[int], dtype: str) -> dict:
  """The source's config.json with only what the removal of layers and the type of the weights change."""
  key_of_depth = getattr(family, 'DEPTH', 'num_hidden_layers')
  depth, changes = config[key_of_depth], {}
  if len(kept) < depth:
    changes = {
      key: [value[l] for l in kept]
      for key, value in config.items()
      if isinstance(value, list) and len(value) == depth and key.endswith(('layer_types', '_layers'))
    }
    changes |= family.pruned(config, kept) if hasattr(family, 'pruned') else {}
    changes[key_of_depth] = len(kept)
  if dtype:  # transformers 5 writes `dtype`, 4 `torch_dtype`; both are read by both
    changes['dtype' if 'dtype' in config else 'torch_dtype'] = dtype
  changes |= _rope_for_transformers_4(family, config)
  # None: a rule by which the list was made, which does not hold any more.
  return {key: value for key, value in (config | changes).items() if not (key in changes and value is None)}
