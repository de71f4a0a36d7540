"""Seed-OSS: Llama with biases on queries, keys and values, and a separate switch for that of the output projection."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Seed-OSS'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'head_dim': 128, 'num_key_value_heads': 8} | config, 'residual_dropout')
  fields.one_kind(0)
  size = llama.sizes(fields)
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'])),
    qkv_bias=fields.flag('attention_bias', True),
    out_bias=fields.flag('attention_out_bias'),
    mlp_bias=fields.flag('mlp_bias'),
  )
  return spec, fields.done('seed_oss')
