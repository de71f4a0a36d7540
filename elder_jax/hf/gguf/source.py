"""A GGUF file (llama.cpp) seen as the Hugging Face checkpoint that it was made from: config, tokenizer, tensors."""

import json
import os
import pathlib
import re

import gguf
import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.hf import families
from elder_jax.hf.gguf import header
from elder_jax.hf.gguf import tokenizer as gguf_tokenizer
from elder_jax.log import write_whole
from elder_jax.model.spec import Spec

_FOLDER = 'use the Hugging Face folder of this model'
# general.type, or the architecture, of files that are no model.
_NO_MODEL = {
  'adapter': 'a LoRA adapter, not a model; merge it into its model with llama-export-lora and give the merged file',
  'controlvector': 'a control vector, not a model; give the .gguf of the model',
  'imatrix': 'an importance matrix, not a model; give the .gguf of the model',
  'mmproj': 'the image or audio part of a model; give the .gguf of its language model',
  'clip': 'the image or audio part of a model; give the .gguf of its language model',
}
# Fields of an architecture that change nothing, and those that change nothing with this value. Every other one is refused
# if config_from_gguf does not ask for it.
_NEUTRAL = (
  'attention.layer_norm_epsilon pooling_type rope.scaling.finetuned rope.scaling.original_context_length'.split()
)
_OFF = {
  **dict.fromkeys(
    'expert_count expert_used_count expert_shared_count expert_group_count expert_group_used_count nextn_predict_layers '
    'leading_dense_block_count attention.sliding_window attention.scale attention.clamp_kqv attention.max_alibi_bias '
    'attn_logit_softcapping final_logit_softcapping use_parallel_residual'.split(),
    0,
  ),
  **dict.fromkeys('rope.scaling.attn_factor logit_scale residual_scale embedding_scale attention.causal'.split(), 1),
  'tensor_data_layout': 'Meta AI original pth',
}


_MISSING = object()


def open_gguf(path: pathlib.Path, scratch: pathlib.Path):
  """Writes config.json, tokenizer and generation_config.json into `scratch`.

  Returns:
    (config, {name: shape}, {name: type that the tensor is exported in}, read). Quantised weights are not worth float32.
  """
  fields, _, listed = read_raw(path)
  family = _family(path, fields)
  tensors = {t.name: t for t in listed}
  config, num_layers = _config(path, fields, tensors, family)
  by_hf_name = _by_hf_name(path, fields, tensors, family, num_layers)
  shapes = {n: t.shape[::-1] for n, t in by_hf_name.items()}  # GGUF: fastest axis first
  _check_types(path, listed)

  def read(name: str) -> np.ndarray:
    tensor = by_hf_name[name]
    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    return family.from_gguf(name, weight.reshape(shapes[name]), config)

  _write_files(scratch, config, fields, path)
  plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
  dtype = 'float32' if {t.tensor_type for t in listed} <= plain else 'bfloat16'
  return config, shapes, dict.fromkeys(shapes, dtype), read


def spec_of(path: pathlib.Path) -> tuple[Spec, int]:
  """(Spec, number of layers) of a file, by its metadata and the names of its tensors."""
  fields, _, listed = read_raw(path)
  family, tensors = _family(path, fields), {t.name: t for t in listed}
  config, num_layers = _config(path, fields, tensors, family)
  _by_hf_name(path, fields, tensors, family, num_layers)
  return family.spec_from_config(config)


def _family(path: pathlib.Path, fields: dict):
  """The family's module, by the file's architecture."""
  for key in ('general.type', 'general.architecture'):
    if (what := _NO_MODEL.get(str(fields.get(key)))) is not None:
      raise InputError(f'{path}: is {what}.')
  architecture = fields.get('general.architecture')
  known = {f.GGUF_ARCHITECTURE: f for f in families.FAMILIES.values() if hasattr(f, 'GGUF_ARCHITECTURE')}
  family = known.get(architecture) if isinstance(architecture, str) else None
  if family is None:
    raise InputError(f'{path}: GGUF architecture {architecture!r} is not supported, these are: {", ".join(known)}.')
  return family


class _Fields:
  """The fields of the file's architecture, each checked when it is asked for; `asked` has the names of those."""

  def __init__(self, fields: dict):
    self._fields, self.asked = fields, set()

  def __call__(self, name: str, default=_MISSING, per_layer: bool = False):
    """The value of a field.

    Args:
      per_layer: it may be a list with an entry for each layer.
    """
    key = f'{self._fields["general.architecture"]}.{name}'
    self.asked.add(key)
    value = self._fields.get(key, default)
    if isinstance(value, list) and not per_layer:
      raise InputError(f'the GGUF field {key} has a value for each layer, only one for all is supported; {_FOLDER}.')
    if isinstance(value, int) and value > 2**31:  # before a table of that size is made
      raise InputError(f'the GGUF field {key} is {value}, which is larger than in any model; {_FOLDER}.')
    if value is not _MISSING:
      return value
    if name == 'vocab_size' and 'tokenizer.ggml.tokens' in self._fields:
      return len(self._fields['tokenizer.ggml.tokens'])
    raise InputError(f'the GGUF field {key} is missing; {_FOLDER}.')


def _config(path: pathlib.Path, fields: dict, tensors: dict, family) -> tuple[dict, int]:
  """(config.json, number of layers)."""
  field = _Fields(fields)
  try:
    config = family.config_from_gguf(field, tensors)
    _check_known(fields, fields['general.architecture'], field.asked)
    _, num_layers = family.spec_from_config(config)
  except InputError as e:
    raise InputError(f'{path}: {e}') from e
  except (TypeError, ValueError) as e:
    raise InputError(f'{path}: the GGUF fields are not usable ({reason(e)}); {_FOLDER}.') from e
  for ours in ('bos_token_id', 'eos_token_id'):
    if (value := fields.get(f'tokenizer.ggml.{ours}')) is not None:
      config[ours] = value
  return config, num_layers


def _by_hf_name(path: pathlib.Path, fields: dict, tensors: dict, family, num_layers: int) -> dict:
  """{Hugging Face name: tensor}. Raises InputError for a tensor that the family does not know."""
  architecture = fields['general.architecture']
  if num_layers > len(tensors):  # before a table of so many layers is made
    raise InputError(
      f'{path}: the GGUF field {architecture}.block_count is {num_layers}, but there are only {len(tensors)} '
      f'tensors; {_FOLDER}.'
    )
  names = {}  # GGUF name -> Hugging Face name
  for hf_name, gguf_name in family.GGUF_NAMES.items():
    for l in range(num_layers) if '{l}' in gguf_name else [None]:
      names[gguf_name.format(l=l)] = hf_name.format(l=l)
  derived = getattr(family, 'GGUF_DERIVED', None)
  if (extra := next((n for n in tensors if n not in names and n != derived), None)) is not None:
    raise InputError(f'{path}: the GGUF tensor {extra} is not known for {architecture}; {_FOLDER}.')
  return {names[n]: t for n, t in tensors.items() if n != derived}


def _check_types(path: pathlib.Path, listed: list):
  """One tensor of each type is dequantised, before any is needed."""
  for tensor in {t.tensor_type: t for t in listed}.values():
    try:
      gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as e:  # nothing unfinished here: what the gguf package raises for a type it cannot read
      kind = tensor.tensor_type.name
      raise InputError(f'{path}: the quantisation {kind} of {tensor.name} is not supported; use Q8_0 or F16.') from e


def read_raw(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[header.Tensor]]:
  """As header.read_raw, of all parts where the file is one of several."""
  fields, raw, tensors = _read_part(path)
  if (count := fields.get('split.count', 1)) in (0, 1):
    return fields, raw, tensors
  parts = parts_of(path)
  if len(parts) != count:
    raise InputError(
      f'{path}: is one of {count} parts of a split GGUF file; give it the name that it had, NAME-00001-of-00002.gguf, or '
      'merge the parts with llama-gguf-split --merge.'
    )
  if (absent := next((p for p in parts if not os.path.isfile(p)), None)) is not None:
    raise InputError(
      f'{absent}: is missing; {path.name} is one of {count} parts of a split GGUF file, fetch all of them.'
    )
  read = [_read_part(p) for p in parts]
  tensors = [t for *_, of_part in read for t in of_part]
  if len({t.name for t in tensors}) != fields.get('split.tensors.count', len(tensors)):
    raise InputError(
      f'{path}: the {count} parts of this split GGUF file do not belong together; fetch all of them again.'
    )
  return *read[0][:2], tensors


def parts_of(path: pathlib.Path) -> list[pathlib.Path]:
  """All files of a split GGUF file by their names, NAME-00001-of-00002.gguf; of any other file that file."""
  name = re.fullmatch(r'(.*-)\d{5}-of-(\d{5})', path.stem)
  if not name:
    return [path]
  return [path.with_name(f'{name[1]}{i + 1:05d}-of-{name[2]}{path.suffix}') for i in range(int(name[2]))]


def _read_part(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[header.Tensor]]:
  try:
    return header.read_raw(path)
  except (ValueError, EOFError, OSError) as e:
    raise InputError(f'{path}: is truncated or not a GGUF file ({reason(e)}); fetch it again.') from e


def _check_known(fields: dict, architecture: str, asked: set[str]):
  """Refuses what nobody asked for, all at once. What llama.cpp computes is in these fields only, not in general.*, say."""

  def known(key: str, value) -> bool:
    if key.startswith('tokenizer.'):
      return gguf_tokenizer.is_known(key, value)
    name = key.removeprefix(f'{architecture}.')
    return name == key or key in asked or name in _NEUTRAL or (name in _OFF and value == _OFF[name])

  unknown = [f'{key}={str(value)[:40]}' for key, value in fields.items() if not known(key, value)]
  if unknown:
    raise InputError(f'the GGUF fields {", ".join(unknown)} are not known and may change the computation; {_FOLDER}.')


def _write_files(scratch: pathlib.Path, config: dict, fields: dict, path: pathlib.Path):
  scratch.mkdir(parents=True, exist_ok=True)
  tokenizer, settings, ends = gguf_tokenizer.build(fields, path)
  generation = {key: config[key] for key in ('bos_token_id',) if key in config}
  if ends:
    generation['eos_token_id'] = ends if len(ends) > 1 else ends[0]
  settings['model_max_length'] = config['max_position_embeddings']
  made = {'config.json': config, 'generation_config.json': generation, 'tokenizer_config.json': settings}
  texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + '\n' for name, value in made.items()}
  for name, text in (texts | {'tokenizer.json': tokenizer.to_str(pretty=True)}).items():
    file = scratch / name
    if not file.is_file() or file.read_bytes() != text.encode():  # other processes of the run may be reading it
      write_whole(file, text)
