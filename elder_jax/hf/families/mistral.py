"""Mistral: Llama with a sliding window in every layer."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Mistral 7B, Mistral Nemo'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'num_key_value_heads': 8, 'sliding_window': 4096} | config)
  size, L = llama.sizes(fields), fields.size('num_hidden_layers')
  window = fields.window('sliding_window')
  fields.one_kind(window)
  spec = Spec(**size, **rope.features(fields.rope(size['head_dim'])), window_L=fields.per_layer(L, window))
  return spec, fields.done('mistral')
