"""SmolLM3: Llama in which some layers have no position embedding."""

from elder_jax.errors import InputError
from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import MOST_LAYERS
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'SmolLM3'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'tie_word_embeddings': True, 'num_key_value_heads': 4} | config, 'max_window_layers')
  size, L = llama.sizes(fields), fields.size('num_hidden_layers')
  has_rope_L = _has_rope(fields, L)
  window = fields.window('sliding_window', fields.flag('use_sliding_window'))
  kinds = fields.layer_kinds(lambda l: 'full_attention' if has_rope_L[l] or not window else 'sliding_attention')
  bias, table = fields.flag('attention_bias'), fields.rope(size['head_dim'], theta=2e6)
  spec = Spec(
    **size,
    **rope.features(table, table.without_positions()),
    rope_L=tuple(int(not has) for has in has_rope_L),
    window_L=tuple(window if kind == 'sliding_attention' else 0 for kind in kinds),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=fields.flag('mlp_bias'),
  )
  return spec, fields.done('smollm3')


def _has_rope(fields: Fields, L: int) -> list[int]:
  every = fields.size('no_rope_layer_interval', 4)
  has = fields.any('no_rope_layers')
  if has is None:
    return [int((l + 1) % every != 0) for l in range(min(L, MOST_LAYERS))]
  if not isinstance(has, list) or len(has) != L or any(type(h) is not int or h not in (0, 1) for h in has):
    raise InputError(f'config.json: no_rope_layers must have a 0 or 1 for each of the {L} layers; correct the file.')
  return has


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  has = _has_rope(Fields(config), config['num_hidden_layers'])
  return {'no_rope_layers': [has[l] for l in kept]}
