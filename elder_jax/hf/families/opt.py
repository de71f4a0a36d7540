"""OPT: learned positions, ReLU, biases; LayerNorm before attention and MLP (after them in the 350M)."""

from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'OPT, all but one size (docs/adding_a_family.md)'
_LAYER = 'model.decoder.layers.{l}.'
WEIGHTS = {
  'model.decoder.embed_tokens.weight': ('embed', 'V,D->VD'),
  'model.decoder.embed_positions.weight': ('positions', 'P,D->PD'),
  _LAYER + 'self_attn.q_proj.weight': ('layers.wq', 'NH,D->DNH'),
  _LAYER + 'self_attn.q_proj.bias': ('layers.bq', 'NH->NH'),
  _LAYER + 'self_attn.k_proj.weight': ('layers.wk', 'KH,D->DKH'),
  _LAYER + 'self_attn.k_proj.bias': ('layers.bk', 'KH->KH'),
  _LAYER + 'self_attn.v_proj.weight': ('layers.wv', 'KH,D->DKH'),
  _LAYER + 'self_attn.v_proj.bias': ('layers.bv', 'KH->KH'),
  _LAYER + 'self_attn.out_proj.weight': ('layers.wo', 'D,NH->NHD'),
  _LAYER + 'self_attn.out_proj.bias': ('layers.bo', 'D->D'),
  _LAYER + 'self_attn_layer_norm.weight': ('layers.attn_norm.scale', 'D->D'),
  _LAYER + 'self_attn_layer_norm.bias': ('layers.attn_norm.bias', 'D->D'),
  _LAYER + 'fc1.weight': ('layers.w_up', 'F,D->DF'),
  _LAYER + 'fc1.bias': ('layers.b_up', 'F->F'),
  _LAYER + 'fc2.weight': ('layers.w_down', 'D,F->FD'),
  _LAYER + 'fc2.bias': ('layers.b_down', 'D->D'),
  _LAYER + 'final_layer_norm.weight': ('layers.mlp_norm.scale', 'D->D'),
  _LAYER + 'final_layer_norm.bias': ('layers.mlp_norm.bias', 'D->D'),
  'model.decoder.version': None,  # in old files
  'model.decoder.final_layer_norm.weight': ('final_norm.scale', 'D->D'),
  'model.decoder.final_layer_norm.bias': ('final_norm.bias', 'D->D'),
  'lm_head.weight': ('head', 'V,D->VD'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  heads = fields.heads(kv_heads=None)
  fields.only('word_embed_proj_dim', heads['d_model'])  # otherwise the files have project_in and project_out
  fields.only('layer_norm_elementwise_affine', True)
  before, bias = fields.flag('do_layer_norm_before', True), fields.flag('enable_bias', True)
  bare = fields.flag('_remove_final_layer_norm')
  spec = Spec(
    **heads,
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('ffn_dim'),
    norm_eps=1e-5,
    tied=fields.flag('tie_word_embeddings', True),
    rope_freq_RH=((),),
    norm='layer',
    block='pre' if before else 'post',
    final_norm=before and not bare,
    gated_mlp=False,
    activation=fields.activation('activation_function', 'relu'),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
    num_positions=fields.size('max_position_embeddings', 2048),
    position_offset=2,
  )
  return spec, fields.done('opt')
