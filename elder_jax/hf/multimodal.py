"""The language model inside a multimodal folder: Gemma 3 from 4B, Mistral Small 3.1 and 3.2, Qwen2.5-VL, Qwen3.5.

The other parts, such as the vision encoder, are copied byte for byte.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

from elder_jax.hf.families import rope


class Multimodal(NamedTuple):
  """A multimodal folder.

  config: its config.json.
  names: of the language model's tensors: name in a stand-alone language model -> name in the folder.
  others: names of the tensors of the other parts.
  num_bytes: bytes of these tensors.
  """

  config: dict
  names: dict[str, str]
  others: tuple[str, ...]
  num_bytes: int

  def name_of(self, ours: str, before: str) -> str:
    """A tensor's name in the exported folder.

    Args:
      ours: its name in the stand-alone pruned model.
      before: its name in the stand-alone source; the layer number may differ.
    """
    in_folder = self.names[before]
    return in_folder[: len(in_folder) - len(_tail(before))] + _tail(ours)

  def cut_config(self, after: dict) -> dict:
    """The folder's config.json after its language model's became `after`."""
    before = language_config(self.config)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    deleted = before.keys() - after.keys()
    text = self.config.get('text_config')
    new = {key: value for key, value in ((text or self.config) | changed).items() if key not in deleted}
    outer = {key: changed[key] for key in _SHARED if key in changed}  # transformers reads the outer key first
    return self.config | outer | {'text_config': new} if text else new


class _Kind(NamedTuple):
  models: str  # their names, for docs/models.md
  language: str  # model_type of the stand-alone language model
  architecture: str
  text_types: tuple[str | None, ...]  # model_type in text_config; None: there may be no text_config
  defaults: Mapping[str, object]  # where they differ from those of the stand-alone language model


KINDS = {
  'gemma3': _Kind(
    'Gemma 3 from 4B',
    'gemma3_text',
    'Gemma3ForCausalLM',
    ('gemma3_text',),
    {'tie_word_embeddings': True, 'vocab_size': 262_208, 'num_attention_heads': 8, 'num_key_value_heads': 4},
  ),
  'mistral3': _Kind(
    'Mistral Small 3.1 and 3.2', 'mistral', 'MistralForCausalLM', ('mistral',), {'tie_word_embeddings': True}
  ),
  'qwen3_5': _Kind(
    'Qwen3.5, dense',
    'qwen3_5_text',
    'Qwen3_5ForCausalLM',
    ('qwen3_5_text',),
    {'tie_word_embeddings': False},
  ),
  'qwen2_5_vl': _Kind(
    'Qwen2.5-VL',
    'qwen2',
    'Qwen2ForCausalLM',
    ('qwen2_5_vl_text', 'qwen2_5_vl', None),
    {'tie_word_embeddings': False, 'rms_norm_eps': 1e-5, 'rope_theta': 1e6},
  ),
}
# Prefix in the folder -> prefix in a stand-alone language model. The first that matches counts.
_PREFIXES = {
  'language_model.model.': 'model.',
  'language_model.lm_head.': 'lm_head.',
  'model.language_model.': 'model.',
  **{f'model.{part}.': f'model.{part}.' for part in ('embed_tokens', 'layers', 'norm')},
  'lm_head.': 'lm_head.',
}
# Keys at the top level of config.json that also apply to the language model.
_SHARED = ('tie_word_embeddings', 'torch_dtype', 'dtype', 'bos_token_id', 'eos_token_id', 'quantization_config')
# Keys about pictures, which Qwen2.5-VL without a text_config mixes with those of its language model.
_OF_PICTURES = ('vision_config', 'image_token_id', 'video_token_id', 'vision_token_id')
_OF_PICTURES += ('vision_start_token_id', 'vision_end_token_id')

# Files for pictures, in addition to the weights.
FILES_OF_PICTURES = ('preprocessor_config.json', 'processor_config.json', 'video_preprocessor_config.json')


def is_multimodal(config: dict) -> bool:
  """Whether a config.json belongs to a multimodal folder of a supported kind."""
  kind, text = config.get('model_type'), config.get('text_config')
  if not isinstance(kind, str) or kind not in KINDS:
    return False
  return (text.get('model_type') if isinstance(text, dict) else None) in KINDS[kind].text_types


def language_config(config: dict) -> dict:
  """config.json of the stand-alone language model. Unchanged if the folder is not multimodal."""
  if not is_multimodal(config):
    return config
  kind, text = KINDS[config['model_type']], config.get('text_config')
  shared = {key: config[key] for key in _SHARED if key in config}
  found = {**kind.defaults, **shared, **(config if text is None else text)}
  found['tie_word_embeddings'] = _tied(kind, config, text or {})
  found = {key: value for key, value in found.items() if key not in _OF_PICTURES}
  found = rope.of_text(found)
  return found | {'model_type': kind.language, 'architectures': [kind.architecture]}


def _tied(kind: _Kind, config: dict, text: dict) -> object:
  """transformers 5 reads the top-level key. For Qwen2.5-VL it may be in text_config, where version 4 wrote it."""
  own = config.get('tie_word_embeddings', kind.defaults['tie_word_embeddings'])
  return text.get('tie_word_embeddings', own) if own is False and kind.language == 'qwen2' else own


def language_names(names: Iterable[str]) -> dict[str, str]:
  """{name in a stand-alone language model: name in the folder} of the language model's tensors."""
  found = {}
  for name in names:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
    if prefix is not None:
      found[_PREFIXES[prefix] + name[len(prefix) :]] = name
  return found


def _tail(name: str) -> str:
  """The part of a name that is the same in the folder and in a stand-alone language model."""
  return name.partition('.')[2]
