"""A language model that is a part of a folder: Gemma 3 from 4B, Mistral Small 3.1 and 3.2, Qwen2.5-VL.

The other parts, towers for pictures above all, stay as they are, octet for octet.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

from elder_jax.hf.families import rope


class Multimodal(NamedTuple):
  """The folder.

  config: its config.json.
  names: of the language model's tensors: by itself -> in the folder.
  others: names of the tensors of the other parts.
  octets: of these.
  """

  config: dict
  names: dict[str, str]
  others: tuple[str, ...]
  octets: int

  def name_of(self, ours: str, before: str) -> str:
    """The name in the folder of a tensor that was called `before` in the source and may be of a lower layer now."""
    there = self.names[before]
    return there[: len(there) - len(_tail(before))] + _tail(ours)

  def cut_config(self, after: dict) -> dict:
    """The folder's config.json, its language model having `after` as its own."""
    before = language_config(self.config)
    changed = {key: value for key, value in after.items() if before.get(key) != value}
    gone = before.keys() - after.keys()
    here = self.config.get('text_config')
    new = {key: value for key, value in ((here or self.config) | changed).items() if key not in gone}
    outer = {key: changed[key] for key in _SHARED if key in changed}  # what transformers reads there first
    return self.config | outer | {'text_config': new} if here else new


class _Kind(NamedTuple):
  models: str  # their names
  language: str  # model_type of the language model by itself
  architecture: str
  text_types: tuple[str | None, ...]  # model_type in text_config; None: there may be no text_config
  defaults: Mapping[str, object]  # that the language model by itself has not


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
# Begin of a name in the folder -> by itself, in the order in which they are tried.
_BEGINS = {
  'language_model.model.': 'model.',
  'language_model.lm_head.': 'lm_head.',
  'model.language_model.': 'model.',
  **{f'model.{part}.': f'model.{part}.' for part in ('embed_tokens', 'layers', 'norm')},
  'lm_head.': 'lm_head.',
}
# Keys that the folder has for its language model, too.
_SHARED = ('tie_word_embeddings', 'torch_dtype', 'dtype', 'bos_token_id', 'eos_token_id', 'quantization_config')
# Keys of Qwen2.5-VL's language model that are about pictures, where there is no text_config.
_OF_PICTURES = ('vision_config', 'image_token_id', 'video_token_id', 'vision_token_id')
_OF_PICTURES += ('vision_start_token_id', 'vision_end_token_id')

# What a folder has for pictures beside its weights.
FILES_OF_PICTURES = ('preprocessor_config.json', 'processor_config.json', 'video_preprocessor_config.json')


def is_multimodal(config: dict) -> bool:
  """Whether a config.json is of a folder of several parts, of a kind that is known."""
  kind, text = config.get('model_type'), config.get('text_config')
  if not isinstance(kind, str) or kind not in KINDS:
    return False
  return (text.get('model_type') if isinstance(text, dict) else None) in KINDS[kind].text_types


def language_config(config: dict) -> dict:
  """config.json of the language model by itself; the same one, where it is of nothing else."""
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
  """transformers 5 goes by the folder's own key; Qwen2.5-VL's may be in text_config, which version 4 wrote there."""
  own = config.get('tie_word_embeddings', kind.defaults['tie_word_embeddings'])
  return text.get('tie_word_embeddings', own) if own is False and kind.language == 'qwen2' else own


def language_names(names: Iterable[str]) -> dict[str, str]:
  """{name by itself: name in the folder} of the language model's tensors."""
  found = {}
  for name in names:
    begin = next((begin for begin in _BEGINS if name.startswith(begin)), None)
    if begin is not None:
      found[_BEGINS[begin] + name[len(begin) :]] = name
  return found


def _tail(name: str) -> str:
  """What a name by itself and in the folder share."""
  return name.partition('.')[2]
