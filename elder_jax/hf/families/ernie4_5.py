"""ERNIE 4.5, dense: Llama with rotary embeddings on neighbouring pairs."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'ERNIE 4.5, dense'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  defaults = {'head_dim': 128, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': True}
  fields = Fields(defaults | config, 'compression_ratio')
  fields.one_kind(0)
  size, bias = llama.sizes(fields), fields.flag('use_bias')
  table = fields.rope(size['head_dim'], theta=5e5)
  spec = Spec(**size, **rope.features(table), rope_pairs=True, qkv_bias=bias, out_bias=bias, mlp_bias=bias)
  return spec, fields.done('ernie4_5')
