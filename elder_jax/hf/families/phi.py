"""Phi-1, 1.5 and 2: attention and MLP in parallel after one LayerNorm; biases everywhere, a part of each head rotated."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Phi-1, 1.5, 2'
_SHARED = ('q_proj', 'k_proj', 'v_proj', 'embed_tokens', 'lm_head', 'rotary_emb')
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if any(part in name for part in _SHARED)} | {
  'model.layers.{l}.input_layernorm.weight': ('layers.attn_norm.scale', 'D->D'),
  'model.layers.{l}.input_layernorm.bias': ('layers.attn_norm.bias', 'D->D'),
  'model.layers.{l}.self_attn.dense.weight': ('layers.wo', 'D,NH->NHD'),
  'model.layers.{l}.self_attn.dense.bias': ('layers.bo', 'D->D'),
  'model.layers.{l}.mlp.fc1.weight': ('layers.w_up', 'F,D->DF'),
  'model.layers.{l}.mlp.fc1.bias': ('layers.b_up', 'F->F'),
  'model.layers.{l}.mlp.fc2.weight': ('layers.w_down', 'D,F->FD'),
  'model.layers.{l}.mlp.fc2.bias': ('layers.b_down', 'D->D'),
  'model.final_layernorm.weight': ('final_norm.scale', 'D->D'),
  'model.final_layernorm.bias': ('final_norm.bias', 'D->D'),
  'lm_head.bias': ('head_bias', 'V->V'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  heads = fields.heads()
  spec = Spec(
    **heads,
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('intermediate_size'),
    norm_eps=fields.number('layer_norm_eps', 1e-5),
    tied=fields.flag('tie_word_embeddings'),
    **rope.features(fields.rope(heads['head_dim'], part=0.5, keys=('rope_theta', 'partial_rotary_factor'))),
    norm='layer',
    block='parallel',
    shared_norm=True,
    gated_mlp=False,
    activation=fields.activation('hidden_act', 'gelu_new'),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    head_bias=True,
  )
  return spec, fields.done('phi')
