"""GPT-NeoX and Pythia: attention and MLP in parallel, a part of each head rotated; q, k and v interleaved by head."""

from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'GPT-NeoX, Pythia'
_LAYER = 'gpt_neox.layers.{l}.'
# '*': the parts alternate in this dimension: q, k and v of the first head, then those of the second, and so on.
WEIGHTS = {
  'gpt_neox.embed_in.weight': ('embed', 'V,D->VD'),
  _LAYER + 'input_layernorm.weight': ('layers.attn_norm.scale', 'D->D'),
  _LAYER + 'input_layernorm.bias': ('layers.attn_norm.bias', 'D->D'),
  _LAYER + 'post_attention_layernorm.weight': ('layers.mlp_norm.scale', 'D->D'),
  _LAYER + 'post_attention_layernorm.bias': ('layers.mlp_norm.bias', 'D->D'),
  _LAYER + 'attention.query_key_value.weight': tuple((f'layers.w{p}', 'N*H,D->DNH') for p in 'qkv'),
  _LAYER + 'attention.query_key_value.bias': tuple((f'layers.b{p}', 'N*H->NH') for p in 'qkv'),
  _LAYER + 'attention.dense.weight': ('layers.wo', 'D,NH->NHD'),
  _LAYER + 'attention.dense.bias': ('layers.bo', 'D->D'),
  _LAYER + 'attention.bias': None,  # the causal mask and rotary frequencies, in old files
  _LAYER + 'attention.masked_bias': None,
  _LAYER + 'attention.rotary_emb.inv_freq': None,
  _LAYER + 'attention.rotary_emb.cos_cached': None,
  _LAYER + 'attention.rotary_emb.sin_cached': None,
  'gpt_neox.rotary_emb.inv_freq': None,
  _LAYER + 'mlp.dense_h_to_4h.weight': ('layers.w_up', 'F,D->DF'),
  _LAYER + 'mlp.dense_h_to_4h.bias': ('layers.b_up', 'F->F'),
  _LAYER + 'mlp.dense_4h_to_h.weight': ('layers.w_down', 'D,F->FD'),
  _LAYER + 'mlp.dense_4h_to_h.bias': ('layers.b_down', 'D->D'),
  'gpt_neox.final_layer_norm.weight': ('final_norm.scale', 'D->D'),
  'gpt_neox.final_layer_norm.bias': ('final_norm.bias', 'D->D'),
  'embed_out.weight': ('head', 'V,D->VD'),
}
ROPE_KEYS = ('rotary_emb_base', 'rotary_pct')  # outside rope_parameters


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  heads, bias = fields.heads(kv_heads=None), fields.flag('attention_bias', True)
  spec = Spec(
    **heads,
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('intermediate_size'),
    norm_eps=fields.number('layer_norm_eps', 1e-5),
    tied=fields.flag('tie_word_embeddings'),
    **rope.features(fields.rope(heads['head_dim'], part=0.25, keys=ROPE_KEYS)),
    norm='layer',
    block='parallel' if fields.flag('use_parallel_residual', True) else 'pre',
    gated_mlp=False,
    activation=fields.activation('hidden_act', 'gelu'),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=True,
  )
  return spec, fields.done('gpt_neox')
