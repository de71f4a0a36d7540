"""GPT-2: learned positions, LayerNorm, transposed matrices, and queries, keys and values fused in one."""

from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'GPT-2, DistilGPT-2, DialoGPT, Cerebras-GPT'
_LAYER = 'transformer.h.{l}.'
# '+': the parts are concatenated in this dimension.
WEIGHTS = {
  'transformer.wte.weight': ('embed', 'V,D->VD'),
  'transformer.wpe.weight': ('positions', 'P,D->PD'),
  _LAYER + 'ln_1.weight': ('layers.attn_norm.scale', 'D->D'),
  _LAYER + 'ln_1.bias': ('layers.attn_norm.bias', 'D->D'),
  _LAYER + 'attn.c_attn.weight': tuple((f'layers.w{p}', 'D,+NH->DNH') for p in 'qkv'),
  _LAYER + 'attn.c_attn.bias': tuple((f'layers.b{p}', '+NH->NH') for p in 'qkv'),
  _LAYER + 'attn.c_proj.weight': ('layers.wo', 'NH,D->NHD'),
  _LAYER + 'attn.c_proj.bias': ('layers.bo', 'D->D'),
  _LAYER + 'attn.bias': None,  # the causal mask, in old files
  _LAYER + 'attn.masked_bias': None,
  _LAYER + 'ln_2.weight': ('layers.mlp_norm.scale', 'D->D'),
  _LAYER + 'ln_2.bias': ('layers.mlp_norm.bias', 'D->D'),
  _LAYER + 'mlp.c_fc.weight': ('layers.w_up', 'D,F->DF'),
  _LAYER + 'mlp.c_fc.bias': ('layers.b_up', 'F->F'),
  _LAYER + 'mlp.c_proj.weight': ('layers.w_down', 'F,D->FD'),
  _LAYER + 'mlp.c_proj.bias': ('layers.b_down', 'D->D'),
  'transformer.ln_f.weight': ('final_norm.scale', 'D->D'),
  'transformer.ln_f.bias': ('final_norm.bias', 'D->D'),
  'lm_head.weight': ('head', 'V,D->VD'),
}
DEPTH = 'n_layer'  # the key of the number of layers


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  fields.only('scale_attn_weights', True)
  fields.only('scale_attn_by_inverse_layer_idx', False)
  heads = fields.heads('n_head', None, 'n_embd')
  spec = Spec(
    **heads,
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('n_inner', 4 * heads['d_model']),
    norm_eps=fields.number('layer_norm_epsilon', 1e-5),
    tied=fields.flag('tie_word_embeddings', True),
    rope_freq_RH=((),),
    norm='layer',
    gated_mlp=False,
    activation=fields.activation('activation_function', 'gelu_new'),
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    num_positions=fields.size('n_positions', 1024),
  )
  return spec, fields.done('gpt2', DEPTH)
