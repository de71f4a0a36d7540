"""Gemma 3, text: Gemma 2 with norms on queries and keys, and another rope base for layers with a window."""

import numpy as np

from elder_jax.hf.families import gemma2
from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Gemma 3 270M and 1B'
RUN = 'Gemma 3 270M'
WEIGHTS, BOS_FIRST = gemma2.WEIGHTS, gemma2.BOS_FIRST
ROPE_LOCAL = 'rope_local_base_freq'  # outside rope_parameters: the base of layers with a window


def layer_kinds(fields: Fields) -> list[str]:
  every = fields.size('sliding_window_pattern', fields.size('_sliding_window_pattern', 6))
  return fields.layer_kinds(lambda l: 'sliding_attention' if (l + 1) % every else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(gemma2.DEFAULTS | config)
  features, window, kinds = gemma2.common(fields), fields.window('sliding_window'), layer_kinds(fields)
  H = features['head_dim']
  # rope_scaling of old files applies to the layers without a window.
  far = fields.rope(H, theta=1e6, kinds='full_attention')
  near = fields.rope(H, theta=1e4, keys=(ROPE_LOCAL, None), kinds='sliding_attention')
  local_L = tuple(int(kind == 'sliding_attention') for kind in kinds)
  window_L = tuple(window * local for local in local_L)
  spec = Spec(**features, qk_norm=True, **rope.features(far, near), rope_L=local_L, window_L=window_L)
  return spec, fields.done('gemma3_text')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept], 'sliding_window_pattern': None, '_sliding_window_pattern': None}


_BLOCK = 'model.layers.{l}.'
GGUF_ARCHITECTURE = 'gemma3'
GGUF_NAMES = llama.GGUF_NAMES | {
  _BLOCK + 'self_attn.q_norm.weight': 'blk.{l}.attn_q_norm.weight',
  _BLOCK + 'self_attn.k_norm.weight': 'blk.{l}.attn_k_norm.weight',
  _BLOCK + 'post_attention_layernorm.weight': 'blk.{l}.post_attention_norm.weight',
  _BLOCK + 'pre_feedforward_layernorm.weight': 'blk.{l}.ffn_norm.weight',
  _BLOCK + 'post_feedforward_layernorm.weight': 'blk.{l}.post_ffw_norm.weight',
}


def config_from_gguf(field, tensors: dict) -> dict:
  """As llama.config_from_gguf. The defaults are llama.cpp's; scaling applies to the layers without a window."""
  config = llama.gguf_config(field, tensors)
  del config['hidden_act']
  pattern = field('attention.sliding_window_pattern', 6, per_layer=True)
  if isinstance(pattern, list):
    kinds = {'layer_types': ['sliding_attention' if windowed else 'full_attention' for windowed in pattern]}
  else:
    kinds = {'sliding_window_pattern': pattern}
  return (
    config
    | kinds
    | {
      'architectures': ['Gemma3ForCausalLM'],
      'model_type': 'gemma3_text',
      'hidden_activation': 'gelu_pytorch_tanh',
      # Only the 27B, with 62 layers, does not scale its scores by the head width.
      'query_pre_attn_scalar': llama.gguf_head_dim(field) if config['num_hidden_layers'] == 62 else config['head_dim'],
      'sliding_window': field('attention.sliding_window'),
      'rope_local_base_freq': float(field('rope.freq_base_swa', 10000.0)),
      'attention_bias': False,
      'attn_logit_softcapping': None,
      'final_logit_softcapping': llama.gguf_float(field('final_logit_softcapping', 0)) or None,
    }
  )


def from_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """From llama.cpp's 1 + w to Hugging Face's w, for norms."""
  del config
  return weight - 1 if name.endswith('norm.weight') else weight


def to_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """The inverse of from_gguf."""
  del config
  return weight + 1 if name.endswith('norm.weight') else weight
