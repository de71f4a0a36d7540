"""Opens a checkpoint: a Hugging Face folder, a hub id or a GGUF file. Checks every name, shape and type in the headers.

Nothing here unpickles or runs code from a checkpoint.
"""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import os
import pathlib
import re

import numpy as np

from elder_jax import extras
from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.errors import user_path
from elder_jax.hf import copies
from elder_jax.hf import families
from elder_jax.hf import folder as model_folder
from elder_jax.hf import multimodal
from elder_jax.hf import mxfp4
from elder_jax.hf import safetensors_files
from elder_jax.hf import table
from elder_jax.log import log
from elder_jax.model.spec import Spec


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that is open; its weights have not been read."""

  name: str  # as the user wrote it
  files: pathlib.Path  # the folder with config.json, the tokenizer and so on
  config: dict
  spec: Spec
  num_layers: int
  shapes: dict[str, tuple[int, ...]]  # by Hugging Face name
  dtypes: dict[str, str]  # by Hugging Face name: a value of safetensors_files.DTYPES
  read: Callable[[str], np.ndarray]
  # Consecutive pieces of a tensor. A piece is valid until the next but one is read.
  pieces: Callable[[str], Iterator[np.ndarray]]
  whole: multimodal.Multimodal | None = None  # the multimodal folder that the language model is part of

  @property
  def is_gguf(self) -> bool:
    return model_folder.is_gguf(self.name)

  @property
  def dtype(self) -> str:
    """The type of all tensors, or float32 if they differ."""
    kinds = set(self.dtypes.values())
    return kinds.pop() if len(kinds) == 1 else 'float32'

  @property
  def context_length(self) -> int | None:
    """Most tokens of a prompt and its continuation; None if config.json gives no limit."""
    limits = (self.config.get(name) for name in ('max_position_embeddings', 'n_positions', 'n_ctx'))
    return self.spec.most_positions or next((n for n in limits if isinstance(n, int) and n > 0), None)

  @property
  def family(self):
    return families.FAMILIES[self.config['model_type']]


def open_source(model: str, scratch: pathlib.Path) -> Source:
  """Opens the checkpoint that --model names.

  Args:
    model: a Hugging Face folder, a hub id or a .gguf file.
    scratch: config.json, tokenizer and generation_config.json of a GGUF file are written into this folder.

  Raises:
    InputError: it cannot be found or read, or its config and tensors are not those of a supported family.
  """
  if not model:
    raise InputError('model', '', 'is missing; give a Hugging Face folder, a hub id or a .gguf file.')
  if model_folder.is_gguf(model):
    path = user_path(model)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long or not accessible
      raise InputError('model', model, 'there is no such file; check the path.')
    extras.require('gguf', 'a .gguf file', 'model', model)
    from elder_jax.hf.gguf import source as gguf_source  # here: it needs that package

    config, shapes, dtypes, read = gguf_source.open_gguf(path, scratch)
    files = scratch

    def pieces(name):
      return iter([read(name)])
  else:
    files = model_folder.find('model', model)
    config = safetensors_files.read_json(files / 'config.json')
    shapes, dtypes, read, pieces = safetensors_files.open_folder(files)
    if mxfp4.is_packed(config):
      log(f'--model={model}: its MXFP4 weights are read and exported as bfloat16')
      config = {key: value for key, value in config.items() if key != 'quantization_config'}
      shapes, dtypes, read, pieces = mxfp4.unpacked(files, mxfp4.Tensors(shapes, dtypes, read, pieces))
  if multimodal.is_multimodal(config):
    source = _language_model(Source(model, files, config, None, 0, shapes, dtypes, read, pieces))
  else:
    _check_is_lm(model, config)
    spec, num_layers = architecture(model, config)
    source = _with_our_names(Source(model, files, config, spec, num_layers, shapes, dtypes, read, pieces))
  return _only_weights(_with_own_head(source))


def _language_model(source: Source) -> Source:
  """The language model of a multimodal folder."""
  names = multimodal.language_names(source.shapes)
  others = tuple(name for name in source.shapes if name not in names.values())
  num_bytes = copies.total(source.files, others)
  config = multimodal.language_config(source.config)
  spec, num_layers = architecture(source.name, config)

  def renamed(table):
    return {name: table[in_folder] for name, in_folder in names.items()}

  return dataclasses.replace(
    source,
    config=config,
    spec=spec,
    num_layers=num_layers,
    shapes=renamed(source.shapes),
    dtypes=renamed(source.dtypes),
    read=lambda name: source.read(names[name]),
    pieces=lambda name: source.pieces(names[name]),
    whole=multimodal.Multimodal(source.config, names, others, num_bytes),
  )


def _check_is_lm(model: str, config: dict):
  heads = config.get('architectures')
  for head in heads if isinstance(heads, list) else []:
    if re.search(r'For(?!CausalLM)\w+$', str(head)):
      raise InputError(
        'model',
        model,
        f'its config.json names {head}, which does not predict the next token; give the language model '
        '(…ForCausalLM) that it was made from.',
      )


def read_config(model: str) -> dict:
  """config.json of a folder or hub id; nothing else is fetched. Of a multimodal folder, the language model's.

  Raises:
    InputError: there is none, or it is not a JSON object.
  """
  return multimodal.language_config(
    safetensors_files.read_json(model_folder.find('model', model, 'config') / 'config.json')
  )


def architecture(model: str, config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json.

  Args:
    model: the model's name for errors.

  Raises:
    InputError: the family or one of its keys or values is not supported.
  """
  model_type = config.get('model_type')
  if not isinstance(model_type, str) or model_type not in families.FAMILIES:
    raise InputError(
      'model', model, f'model_type {shown(model_type)} is not supported; give one of {", ".join(families.FAMILIES)}.'
    )
  return families.FAMILIES[model_type].spec_from_config(config)


def _with_our_names(source: Source) -> Source:
  """Accepts names without the model's prefix, or with it twice, as transformers does: h.0 is transformer.h.0."""
  templates = source.family.WEIGHTS
  known = table.pattern_of(templates)
  prefix = next(iter(templates)).partition('.')[0] + '.'

  def ours(name: str) -> str:
    spellings = name, prefix + name, name.removeprefix(prefix)
    return next((spelling for spelling in spellings if known.fullmatch(spelling)), name)

  theirs = {ours(name): name for name in source.shapes}
  head, embed = _head_and_embedding(source)
  if source.spec.tied and head in theirs and embed not in theirs:  # one of the two is enough
    theirs[embed] = theirs.pop(head)
  if len(theirs) < len(source.shapes) or all(a == b for a, b in theirs.items()):
    return source  # a duplicate is reported later, as an unexpected tensor

  def by_our_names(table):
    return {ours: table[name] for ours, name in theirs.items()}

  return dataclasses.replace(
    source,
    shapes=by_our_names(source.shapes),
    dtypes=by_our_names(source.dtypes),
    read=lambda name: source.read(theirs[name]),
    pieces=lambda name: source.pieces(theirs[name]),
  )


def _head_and_embedding(source: Source) -> tuple[str, str]:
  """The names of the output head and of the embedding in the family's files."""
  entries = [(name, entry[0]) for name, entry in source.family.WEIGHTS.items() if entry]
  return tuple(next(name for name, path in entries if path == ours) for ours in ('head', 'embed'))


def _with_own_head(source: Source) -> Source:
  """Keeps a head that differs from the embedding, even if tie_word_embeddings is true, as transformers 5 does."""
  head, embed = _head_and_embedding(source)
  if not source.spec.tied or not {head, embed} <= source.shapes.keys() or _equal(source, head, embed):
    return source
  log(
    f'--model={source.name}: tie_word_embeddings is true, but {head} differs from {embed}; the head is kept and the '
    'export sets it to false'
  )
  return dataclasses.replace(
    source,
    config=source.config | {'tie_word_embeddings': False},
    spec=dataclasses.replace(source.spec, tied=False),
  )


def _equal(source: Source, a: str, b: str) -> bool:
  """Whether two matrices have the same values, possibly in different types."""
  if source.shapes[a] != source.shapes[b]:
    return False
  for name in (a, b):
    _check_dtype(source, name)
  x, y = source.read(a), source.read(b)
  rows = 1024  # at a time

  def wide(part):
    return part.astype(np.float32)

  return all(np.array_equal(wide(x[i : i + rows]), wide(y[i : i + rows])) for i in range(0, len(x), rows))


def _only_weights(source: Source) -> Source:
  """Checks names, shapes and types, and drops the buffers."""
  _check_names_and_shapes(source)
  rows = table.rows_of(source.family, source.spec, source.num_layers)
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
    problem = 'is in float64; convert the checkpoint to float32 or bfloat16'
  else:
    problem = f'has the type {dtype}, which is not supported; use the unquantised checkpoint'
  raise InputError('model', source.name, f'the tensor {name} {problem}.')


def _ignored(family, spec: Spec) -> re.Pattern:
  names = [n for n, e in family.WEIGHTS.items() if e is None or (e[0] == 'head' and spec.tied)]
  return table.pattern_of(names)


def _check_names_and_shapes(source: Source):
  where = 'model', source.name
  if source.num_layers > len(source.shapes):  # before a table of that many layers is built
    raise InputError(
      *where,
      f'config.json has num_hidden_layers={source.num_layers}, but there are only {len(source.shapes)} '
      'tensors; use the config.json of these weights.',
    )
  rows = {row.name: row for row in table.rows_of(source.family, source.spec, source.num_layers)}
  if (missing := next((n for n in rows if n not in source.shapes), None)) is not None:
    raise InputError(
      *where, f'the tensor {missing} is missing; fetch all files again, or use the config.json of these weights.'
    )
  ignored = _ignored(source.family, source.spec)
  if (extra := next((n for n in source.shapes if n not in rows and not ignored.fullmatch(n)), None)) is not None:
    for part, what in (('lora_', 'a LoRA factor that was not merged'), ('qweight', 'quantised by GPTQ or AWQ')):
      if part in extra:
        raise InputError(*where, f'the tensor {extra} has no place in the model: it is {what}; give the plain model.')
    raise InputError(
      *where,
      f'the tensor {extra} has no place in a {source.config["model_type"]} model with this config.json; use the '
      'config.json of these weights, or a checkpoint without the tensor.',
    )
  for name, row in rows.items():
    if source.shapes[name] != row.shape:
      keys = ' by its vocab_size and width' if row.parts[0].path in ('embed', 'head') else ''
      raise InputError(
        *where,
        f'the tensor {name} has shape {list(source.shapes[name])}, config.json requires {list(row.shape)}{keys}; '
        'use the config.json of these weights.',
      )
