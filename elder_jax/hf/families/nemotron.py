"""Nemotron and Minitron, dense: LayerNorms scaled by 1 + w, squared ReLU, a part of each head rotated."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Nemotron and Minitron, dense'
_OTHERS = 'gate_proj q_norm k_norm'.split()
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if not any(part in name for part in _OTHERS)} | {
  'model.layers.{l}.input_layernorm.bias': ('layers.attn_norm.bias', 'D->D'),
  'model.layers.{l}.post_attention_layernorm.bias': ('layers.mlp_norm.bias', 'D->D'),
  'model.norm.bias': ('final_norm.bias', 'D->D'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config, 'kv_channels')
  fields.one_kind(0)
  heads, bias = fields.heads(), fields.flag('attention_bias')
  spec = Spec(
    **heads,
    **rope.features(fields.rope(heads['head_dim'], part=0.5, keys=('rope_theta', 'partial_rotary_factor'))),
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('intermediate_size'),
    norm_eps=fields.number('norm_eps', 1e-5),
    tied=fields.flag('tie_word_embeddings'),
    norm='layer1',
    gated_mlp=False,
    activation=fields.activation('hidden_act', 'relu2'),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=fields.flag('mlp_bias'),
  )
  return spec, fields.done('nemotron')
