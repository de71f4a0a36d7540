"""Gemma 2: norms scaled by 1 + w before and after attention and MLP, capped scores and logits, alternating windows."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Gemma 2'
_NORMS = {'post_attention_layernorm': 'post_attn_norm', 'pre_feedforward_layernorm': 'mlp_norm'}
_NORMS['post_feedforward_layernorm'] = 'post_mlp_norm'
WEIGHTS = llama.WEIGHTS | {
  f'model.layers.{{l}}.{theirs}.weight': (f'layers.{ours}.scale', 'D->D') for theirs, ours in _NORMS.items()
}
# Gemma's defaults for absent keys, where they differ from Llama's.
DEFAULTS = dict(
  num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096, query_pre_attn_scalar=256
)
BOS_FIRST = True  # every training text began with BOS; without it, predictions are poor


def common(fields: Fields) -> dict:
  """Arguments of Spec that Gemma 2 and 3 share."""
  size, bias = llama.sizes(fields, 'hidden_activation', 'gelu_pytorch_tanh'), fields.flag('attention_bias')
  for key in ('hidden_act', 'sliding_window_size'):  # in old files; no code reads them
    fields.any(key)
  return size | dict(
    norm='rms1',
    block='sandwich',
    qkv_bias=bias,
    out_bias=bias,
    embed_scale=size['d_model'] ** 0.5,
    attn_scale=fields.number('query_pre_attn_scalar') ** -0.5,
    attn_softcap=fields.number('attn_logit_softcapping', optional=True),
    final_softcap=fields.number('final_logit_softcapping', optional=True),
  )


def layer_kinds(fields: Fields) -> list[str]:
  return fields.layer_kinds(lambda l: 'sliding_attention' if (l + 1) % 2 else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(DEFAULTS | dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0) | config)
  features, window, kinds = common(fields), fields.window('sliding_window'), layer_kinds(fields)
  window_L = tuple(window if kind == 'sliding_attention' else 0 for kind in kinds)
  spec = Spec(**features, **rope.features(fields.rope(features['head_dim'])), window_L=window_L)
  return spec, fields.done('gemma2')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept]}
