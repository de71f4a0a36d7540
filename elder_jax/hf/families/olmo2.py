"""OLMo 2 (and 3): norms after attention and the MLP, none before; a norm over all queries and one over all keys."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'OLMo 2'
# Norms after attention and the MLP.
BRANCH_NORMS = {
  'model.layers.{l}.post_attention_layernorm.weight': ('layers.post_attn_norm.scale', 'D->D'),
  'model.layers.{l}.post_feedforward_layernorm.weight': ('layers.post_mlp_norm.scale', 'D->D'),
}
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if 'input_layernorm' not in name}
WEIGHTS |= BRANCH_NORMS | {
  'model.layers.{l}.self_attn.q_norm.weight': ('layers.q_norm.scale', 'NH->NH'),
  'model.layers.{l}.self_attn.k_norm.weight': ('layers.k_norm.scale', 'KH->KH'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'rms_norm_eps': 1e-5} | config)
  size = common(fields)
  fields.one_kind(0)
  return Spec(**size, **rope.features(fields.rope(size['head_dim']))), fields.done('olmo2')


def common(fields: Fields) -> dict:
  """Arguments of Spec that OLMo 2 and 3 share."""
  size, bias = llama.sizes(fields), fields.flag('attention_bias')
  fields.only('clip_qkv', None)
  return size | dict(block='branch', qk_norm=True, qk_norm_over='all', qkv_bias=bias, out_bias=bias)
