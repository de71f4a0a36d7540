"""A GGUF file (llama.cpp) seen as the Hugging Face checkpoint that it was made from: config, tokenizer, tensors."""

import json
import pathlib

import gguf
import numpy as np

from elder_jax import families
from elder_jax import gguf_header
from elder_jax import gguf_tokenizer
from elder_jax.errors import InputError
from elder_jax.errors import reason


def open_gguf(path: pathlib.Path, scratch: pathlib.Path):
  """Writes config.json, tokenizer and generation_config.json into `scratch`; returns (config, {name: shape}, read)."""
  try:
    fields, listed = gguf_header.read(path)
  except (ValueError, EOFError, OSError) as e:
    raise InputError(f'{path}: is truncated or not a GGUF file ({reason(e)}); fetch it again.') from e
  architecture = fields.get('general.architecture')
  known = {f.GGUF_ARCHITECTURE: f for f in families.FAMILIES.values() if hasattr(f, 'GGUF_ARCHITECTURE')}
  family = known.get(architecture) if isinstance(architecture, str) else None
  if family is None:
    raise InputError(f'{path}: GGUF architecture {architecture!r} is not supported, these are: {", ".join(known)}.')

  tensors = {t.name: t for t in listed}
  missing = object()

  def field(name, default=missing):
    value = fields.get(f'{architecture}.{name}', default)
    if value is not missing:
      return value
    if name == 'vocab_size' and 'tokenizer.ggml.tokens' in fields:
      return len(fields['tokenizer.ggml.tokens'])
    raise InputError(f'the GGUF field {architecture}.{name} is missing; fetch the file again.')

  try:
    config = family.config_from_gguf(field, tensors)
    _, num_layers = family.spec_from_config(config)
  except InputError as e:
    raise InputError(f'{path}: {e}') from e
  except (TypeError, ValueError) as e:
    raise InputError(f'{path}: the GGUF fields are not usable ({reason(e)}); use the Hugging Face folder.') from e
  for ours in ('bos_token_id', 'eos_token_id'):
    if (value := fields.get(f'tokenizer.ggml.{ours}')) is not None:
      config[ours] = value
  if num_layers > len(tensors):  # before a table of so many layers is made
    raise InputError(
      f'{path}: the GGUF field {architecture}.block_count is {num_layers}, but there are only {len(tensors)} '
      'tensors; fetch the file again.'
    )
  layers = range(num_layers)
  names = {}  # GGUF name -> Hugging Face name
  for hf_name, gguf_name in family.GGUF_NAMES.items():
    for l in layers if '{l}' in gguf_name else [None]:
      names[gguf_name.format(l=l)] = hf_name.format(l=l)
  derived = getattr(family, 'GGUF_DERIVED', None)
  if (extra := next((n for n in tensors if n not in names and n != derived), None)) is not None:
    raise InputError(f'{path}: the GGUF tensor {extra} is not known for {architecture}; use the Hugging Face folder.')
  by_hf_name = {names[n]: t for n, t in tensors.items() if n != derived}
  shapes = {n: t.shape[::-1] for n, t in by_hf_name.items()}  # GGUF: fastest axis first

  for tensor in {t.tensor_type: t for t in listed}.values():  # one of each type, told before any is needed
    try:
      gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError as e:  # nothing unfinished here: what the gguf package raises for a type it cannot read
      kind = tensor.tensor_type.name
      raise InputError(f'{path}: the quantisation {kind} of {tensor.name} is not supported; use Q8_0 or F16.') from e

  def read(name: str) -> np.ndarray:
    tensor = by_hf_name[name]
    weight = gguf.dequantize(tensor.data, tensor.tensor_type)
    return family.from_gguf(name, weight.reshape(shapes[name]), config)

  _write_files(scratch, config, fields, path)
  return config, shapes, read


def _write_files(scratch: pathlib.Path, config: dict, fields: dict, path: pathlib.Path):
  scratch.mkdir(parents=True, exist_ok=True)
  dump = lambda name, value: (scratch / name).write_text(
    json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8'
  )
  dump('config.json', config)
  ids = {k: fields[f'tokenizer.ggml.{k}'] for k in ('bos_token_id', 'eos_token_id') if f'tokenizer.ggml.{k}' in fields}
  dump('generation_config.json', {'_from_model_config': True, **ids})
  tokenizer, settings = gguf_tokenizer.build(fields, path)
  tokenizer.save(str(scratch / 'tokenizer.json'))
  settings['model_max_length'] = config['max_position_embeddings']
  dump('tokenizer_config.json', settings)
