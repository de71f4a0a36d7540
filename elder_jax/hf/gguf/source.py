"""Reads a GGUF file (llama.cpp) as the Hugging Face checkpoint that it was made from: config, tokenizer, tensors."""

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
# general.type or architecture of files that are not models.
_NO_MODEL = {
  'adapter': 'a LoRA adapter, not a model; merge it into its model with llama-export-lora and give the merged file',
  'controlvector': 'a control vector, not a model; give the .gguf of the model',
  'imatrix': 'an importance matrix, not a model; give the .gguf of the model',
  'mmproj': 'the image or audio part of a model; give the .gguf of its language model',
  'clip': 'the image or audio part of a model; give the .gguf of its language model',
}
# Fields of an architecture that do not change the computation (_NEUTRAL), or not with this value (_OFF). Any other field
# that config_from_gguf does not read raises InputError.
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
  """Opens a GGUF file, and writes config.json, tokenizer and generation_config.json into `scratch`.

  Returns:
    (config, {name: shape}, {name: type for the export}, read). read(name) dequantises a tensor to float32. The type for the
    export is bfloat16 if any tensor is quantised, else float32.

  Raises:
    InputError: the file is damaged, or its architecture, a field, a tensor or a quantisation is not supported.
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
  """(Spec, number of layers) of a file, from its metadata and the names of its tensors. Raises InputError."""
  fields, _, listed = read_raw(path)
  family, tensors = _family(path, fields), {t.name: t for t in listed}
  config, num_layers = _config(path, fields, tensors, family)
  _by_hf_name(path, fields, tensors, family, num_layers)
  return family.spec_from_config(config)


def _family(path: pathlib.Path, fields: dict):
  """The family module for the file's architecture."""
  for key in ('general.type', 'general.architecture'):
    if (what := _NO_MODEL.get(str(fields.get(key)))) is not None:
      raise InputError(f'{path}: is {what}.')
  architecture = fields.get('general.architecture')
  known = {f.GGUF_ARCHITECTURE: f for f in families.FAMILIES.values() if hasattr(f, 'GGUF_ARCHITECTURE')}
  family = known.get(architecture) if isinstance(architecture, str) else None
  if family is None:
    raise InputError(
      f'{path}: the GGUF architecture {architecture!r} is not supported; give a file of one of these: {", ".join(known)}.'
    )
  return family


class _Fields:
  """The fields of the file's architecture. Each is checked when it is read; `read` holds the names of those."""

  def __init__(self, fields: dict):
    self._fields, self.read = fields, set()

  def __call__(self, name: str, default=_MISSING, per_layer: bool = False):
    """The value of a field, or `default` if it is absent.

    Args:
      name: without the architecture.
      per_layer: whether it may be a list with an entry per layer.

    Raises:
      InputError: the field is absent without a default, a list that is not supported, or too large.
    """
    key = f'{self._fields["general.architecture"]}.{name}'
    self.read.add(key)
    value = self._fields.get(key, default)
    if isinstance(value, list) and not per_layer:
      raise InputError(f'the GGUF field {key} has a value per layer, only a single value is supported; {_FOLDER}.')
    if isinstance(value, int) and value > 2**31:  # before a table of that size is built
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
    _check_known(fields, fields['general.architecture'], field.read)
    _, num_layers = family.spec_from_config(config)
  except InputError as e:
    raise InputError(f'{path}: {e}') from e
  except (TypeError, ValueError) as e:
    raise InputError(f'{path}: the GGUF fields are invalid ({reason(e)}); {_FOLDER}.') from e
  for ours in ('bos_token_id', 'eos_token_id'):
    if (value := fields.get(f'tokenizer.ggml.{ours}')) is not None:
      config[ours] = value
  return config, num_layers


def _by_hf_name(path: pathlib.Path, fields: dict, tensors: dict, family, num_layers: int) -> dict:
  """{Hugging Face name: tensor}. Raises InputError for a tensor that the family does not have."""
  architecture = fields['general.architecture']
  if num_layers > len(tensors):  # before a table of that many layers is built
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
  """Tries to dequantise one tensor of each type, so that an unsupported type is reported early."""
  for tensor in {t.tensor_type: t for t in listed}.values():
    try:
      gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as e:  # raised by the gguf package for a type that it cannot read
      kind = tensor.tensor_type.name
      raise InputError(f'{path}: the quantisation {kind} of {tensor.name} is not supported; use Q8_0 or F16.') from e


def read_raw(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[header.Tensor]]:
  """As header.read_raw; if the file is part of a split one, the tensors of all parts.

  Raises:
    InputError: a part is missing, damaged or of another file.
  """
  fields, raw, tensors = _read_part(path)
  if (count := fields.get('split.count', 1)) in (0, 1):
    return fields, raw, tensors
  parts = parts_of(path)
  if len(parts) != count:
    raise InputError(
      f'{path}: is one of {count} parts of a split GGUF file; restore its name, NAME-00001-of-00002.gguf, or merge the '
      'parts with llama-gguf-split --merge.'
    )
  if (absent := next((p for p in parts if not os.path.isfile(p)), None)) is not None:
    raise InputError(
      f'{absent}: is missing; fetch it, because {path.name} is one of {count} parts of a split GGUF file.'
    )
  read = [_read_part(p) for p in parts]
  tensors = [t for *_, of_part in read for t in of_part]
  if len({t.name for t in tensors}) != fields.get('split.tensors.count', len(tensors)):
    raise InputError(
      f'{path}: the {count} parts of this split GGUF file belong to different files; fetch all of them again.'
    )
  return *read[0][:2], tensors


def parts_of(path: pathlib.Path) -> list[pathlib.Path]:
  """The paths of all parts of a split GGUF file, NAME-00001-of-00002.gguf; of any other file, only its own."""
  name = re.fullmatch(r'(.*-)\d{5}-of-(\d{5})', path.stem)
  if not name:
    return [path]
  return [path.with_name(f'{name[1]}{i + 1:05d}-of-{name[2]}{path.suffix}') for i in range(int(name[2]))]


def _read_part(path: pathlib.Path) -> tuple[dict, dict[str, bytes], list[header.Tensor]]:
  try:
    return header.read_raw(path)
  except (ValueError, EOFError, OSError) as e:
    raise InputError(f'{path}: is truncated or not a GGUF file ({reason(e)}); fetch it again.') from e


def _check_known(fields: dict, architecture: str, read: set[str]):
  """Raises InputError that names all fields of the architecture and the tokenizer that are neither read nor harmless.

  Fields of other groups, such as general.*, do not change what llama.cpp computes.
  """

  def known(key: str, value) -> bool:
    if key.startswith('tokenizer.'):
      return gguf_tokenizer.is_known(key, value)
    name = key.removeprefix(f'{architecture}.')
    return name == key or key in read or name in _NEUTRAL or (name in _OFF and value == _OFF[name])

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
  contents = {'config.json': config, 'generation_config.json': generation, 'tokenizer_config.json': settings}
  texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + '\n' for name, value in contents.items()}
  for name, text in (texts | {'tokenizer.json': tokenizer.to_str(pretty=True)}).items():
    file = scratch / name
    if not file.is_file() or file.read_bytes() != text.encode():  # another process of the run may be reading it
      write_whole(file, text)
