"""StarCoder2: LayerNorms, an MLP without a gate, biases everywhere."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'StarCoder2'
_LAYER = 'model.layers.{l}.'
_SHARED = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'norm.weight', 'embed_tokens', 'lm_head', 'rotary_emb')
WEIGHTS = {n: row for n, row in llama.WEIGHTS.items() if any(part in n for part in _SHARED) and '_norm' not in n} | {
  _LAYER + 'input_layernorm.bias': ('layers.attn_norm.bias', 'D->D'),
  _LAYER + 'post_attention_layernorm.bias': ('layers.mlp_norm.bias', 'D->D'),
  _LAYER + 'mlp.c_fc.weight': ('layers.w_up', 'F,D->DF'),
  _LAYER + 'mlp.c_fc.bias': ('layers.b_up', 'F->F'),
  _LAYER + 'mlp.c_proj.weight': ('layers.w_down', 'D,F->FD'),
  _LAYER + 'mlp.c_proj.bias': ('layers.b_down', 'D->D'),
  'model.norm.bias': ('final_norm.bias', 'D->D'),
}


_NEUTRAL = (
  'residual_dropout embedding_dropout activation_function attention_softmax_in_fp32 scale_attention_softmax_in_fp32 '
  'scale_attn_weights layer_norm_epsilon'
)


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(
    {'tie_word_embeddings': True, 'use_bias': True, 'num_key_value_heads': 2} | config,
    _NEUTRAL,
  )
  for key, value in (('norm_type', 'layer_norm'), ('mlp_type', 'default')):  # keys of the first files
    fields.only(key, value)
  heads, bias, L = fields.heads(), fields.flag('use_bias'), fields.size('num_hidden_layers')
  window = fields.window('sliding_window')
  fields.one_kind(window)
  spec = Spec(
    **heads,
    **rope.features(fields.rope(heads['head_dim'])),
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('intermediate_size'),
    norm_eps=fields.number('norm_epsilon', 1e-5),
    tied=fields.flag('tie_word_embeddings'),
    window_L=fields.per_layer(L, window),
    norm='layer',
    gated_mlp=False,
    activation=fields.activation('hidden_act', 'gelu_pytorch_tanh'),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=bias,
  )
  return spec, fields.done('starcoder2')
