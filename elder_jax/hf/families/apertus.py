"""Apertus: an MLP without a gate; its activation, xIELU, has parameters in each layer."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Apertus'
_LAYER = 'model.layers.{l}.'
_OTHERS = 'gate_proj input_layernorm post_attention_layernorm'.split()
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if not any(part in name for part in _OTHERS)} | {
  _LAYER + 'attention_layernorm.weight': ('layers.attn_norm.scale', 'D->D'),
  _LAYER + 'feedforward_layernorm.weight': ('layers.mlp_norm.scale', 'D->D'),
  _LAYER + 'mlp.act_fn.alpha_p': ('layers.act_pos', 'X->X'),
  _LAYER + 'mlp.act_fn.alpha_n': ('layers.act_neg', 'X->X'),
  _LAYER + 'mlp.act_fn.beta': ('layers.act_beta', '->X'),
  _LAYER + 'mlp.act_fn.eps': ('layers.act_eps', '->X'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'rms_norm_eps': 1e-5} | config, 'hidden_dropout')
  fields.only('post_norm', False)
  fields.only('qk_norm', True)
  fields.one_kind(0)
  fields.only('hidden_act', 'xielu')
  size = llama.sizes(fields, 'no_other_activation') | dict(activation='xielu')
  bias = fields.flag('attention_bias')
  table = fields.rope(size['head_dim'], theta=12e6)
  spec = Spec(**size, **rope.features(table), gated_mlp=False, qk_norm=True, qkv_bias=bias, out_bias=bias)
  return spec, fields.done('apertus')
