"""Llama 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna …)."""

import math
import sys

import numpy as np

from elder_jax.errors import InputError
from elder_jax.model import Spec

# Hugging Face name -> (path in model.Decoder, axes there 'HF->ours'), both ways; the stacked layers' L is left out.
# A comma separates HF's dimensions, letters next to each other are folded into one. None: a buffer that is derived
# from the config, skipped when read and not written.
WEIGHTS = {
  'model.embed_tokens.weight': ('embed', 'V,D->VD'),
  'model.layers.{l}.input_layernorm.weight': ('layers.attn_norm', 'D->D'),
  'model.layers.{l}.self_attn.q_proj.weight': ('layers.wq', 'NH,D->DNH'),
  'model.layers.{l}.self_attn.k_proj.weight': ('layers.wk', 'KH,D->DKH'),
  'model.layers.{l}.self_attn.v_proj.weight': ('layers.wv', 'KH,D->DKH'),
  'model.layers.{l}.self_attn.o_proj.weight': ('layers.wo', 'D,NH->NHD'),
  'model.layers.{l}.self_attn.rotary_emb.inv_freq': None,
  'model.layers.{l}.post_attention_layernorm.weight': ('layers.mlp_norm', 'D->D'),
  'model.layers.{l}.mlp.gate_proj.weight': ('layers.w_gate', 'F,D->DF'),
  'model.layers.{l}.mlp.up_proj.weight': ('layers.w_up', 'F,D->DF'),
  'model.layers.{l}.mlp.down_proj.weight': ('layers.w_down', 'D,F->FD'),
  'model.norm.weight': ('final_norm', 'D->D'),
  'lm_head.weight': ('head', 'V,D->VD'),
}

# Keys that change nothing in the computation of logits.
_NEUTRAL = set(
  '_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache initializer_range '
  'bos_token_id eos_token_id pad_token_id attention_dropout max_position_embeddings is_llama_config '
  'transformers.js_config _attn_implementation_autoset name_or_path max_sequence_length max_length '
  'output_attentions output_hidden_states return_dict id2label label2id problem_type chunk_size_feed_forward '
  'is_encoder_decoder unsloth_fixed unsloth_version'.split()
)
# Keys that may only have the value under which they change nothing.
_FIXED = {
    'hidden_act': ('silu',), 'attention_bias': (False,), 'mlp_bias': (False,), 'pretraining_tp': (1,),
    'rope_interleaved': (False,), 'sliding_window': (None,), 'quantization_config': (None,),
}  # fmt: skip
_READ = set(
  'vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim '
  'rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters'.split()
)


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """config.json -> (Spec, number of layers). A key or value that is not understood is refused by name."""
  for key, value in config.items():
    if key in _FIXED and value not in _FIXED[key]:
      raise InputError(
        f'config.json: {key}={value!r} is not supported (only {_FIXED[key][0]!r} is); use a checkpoint without it.'
      )
    if key not in _NEUTRAL and key not in _FIXED and key not in _READ:
      raise InputError(
        f'config.json: the key {key!r} is not known for model_type llama; remove it if it does not change the computation.'
      )
  size = lambda key, default=None: _positive(config, key, default)
  d_model, num_heads = size('hidden_size'), size('num_attention_heads')
  head_dim = size('head_dim', max(1, d_model // num_heads))
  kv_heads = size('num_key_value_heads', num_heads)
  if head_dim % 2:
    raise InputError(
      f'config.json: head_dim={head_dim} is odd, rotary position embedding needs an even one; mend the file.'
    )
  if head_dim > 2**16:  # before a table of that size is made
    raise InputError(f'config.json: head_dim={head_dim} is larger than any model has; mend the file.')
  if num_heads % kv_heads:
    raise InputError(
      f'config.json: num_attention_heads={num_heads} is not a multiple of num_key_value_heads={kv_heads}; mend the file.'
    )
  if (tied := config.get('tie_word_embeddings')) not in (True, False, None):
    raise InputError(f'config.json: tie_word_embeddings={tied!r} must be true or false; mend the file.')
  spec = Spec(
    vocab_size=size('vocab_size'),
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    d_ff=size('intermediate_size'),
    norm_eps=_positive_number(config, 'rms_norm_eps', 1e-6),
    tied=bool(tied),
    rope_freq_H=_rope_frequencies(config, head_dim),
  )
  return spec, size('num_hidden_layers')


def _positive(config, key, default=None) -> int:
  value = config.get(key)
  value = default if value is None else value
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise InputError(f'config.json: {key}={value!r} must be a whole number above 0; mend the file.')
  return value


def _positive_number(config, key, default=None) -> float:
  value = config.get(key)
  value = default if value is None else value
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
    raise InputError(f'config.json: {key}={value!r} must be a number above 0; mend the file.')
  return float(value)


@np.errstate(divide='ignore', over='ignore', invalid='ignore')  # the result is looked at
def _rope_frequencies(config: dict, head_dim: int) -> tuple[float, ...]:
  """Radians per position of each rotated pair; rope_theta and rope_scaling, or transformers 5's rope_parameters."""
  for key in ('rope_scaling', 'rope_parameters'):
    if not isinstance(config.get(key) or {}, dict):
      raise InputError(f'config.json: {key}={config[key]!r} must be an object or null; mend the file.')
  rope = {k: v for k in ('rope_scaling', 'rope_parameters') for k, v in (config.get(k) or {}).items()}
  theta = _positive_number({'rope_theta': rope.pop('rope_theta', config.get('rope_theta'))}, 'rope_theta', 10000.0)
  kind = rope.pop('rope_type', rope.pop('type', 'default'))
  rope.pop('type', None)
  # Rounded to float32 where transformers rounds (torch's power goes through double), so that far positions agree.
  exponent_H = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  freq_H = np.float32(1) / (theta ** exponent_H.astype(np.float64)).astype(np.float32)
  known = {'default': (), 'linear': ('factor',)}
  known['llama3'] = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
  if kind not in list(known):  # a list: it may be what cannot be hashed
    raise InputError(f'config.json: rope type {kind!r} is not supported (default, linear and llama3 are).')
  if unknown := sorted(set(rope) - set(known[kind])):
    raise InputError(f'config.json: rope scaling key {unknown[0]!r} is not known for rope type {kind!r}; remove it.')
  p = {key: _positive_number(rope, key) for key in known[kind]}
  if kind == 'linear':
    freq_H = freq_H / np.float32(p['factor'])
  elif kind == 'llama3':
    # Llama 3.1: wavelengths past the training context are stretched, short ones kept, those between interpolated.
    wavelength_H = 2 * math.pi / freq_H
    low, high, context = p['low_freq_factor'], p['high_freq_factor'], p['original_max_position_embeddings']
    if high <= low:
      raise InputError(f'config.json: rope high_freq_factor={high} must be above low_freq_factor={low}; mend the file.')
    smooth_H = np.clip((context / wavelength_H - low) / (high - low), 0.0, 1.0)
    freq_H = (1 - smooth_H) * freq_H / p['factor'] + smooth_H * freq_H
  if not np.isfinite(freq_H).all():
    raise InputError('config.json: rope_theta and rope scaling give frequencies that are not finite; mend the file.')
  return tuple(float(f) for f in freq_H.astype(np.float32))


# ---- GGUF (llama.cpp) ----

GGUF_ARCHITECTURE = 'llama'
GGUF_NAMES = {
  'model.embed_tokens.weight': 'token_embd.weight',
  'model.layers.{l}.input_layernorm.weight': 'blk.{l}.attn_norm.weight',
  'model.layers.{l}.self_attn.q_proj.weight': 'blk.{l}.attn_q.weight',
  'model.layers.{l}.self_attn.k_proj.weight': 'blk.{l}.attn_k.weight',
  'model.layers.{l}.self_attn.v_proj.weight': 'blk.{l}.attn_v.weight',
  'model.layers.{l}.self_attn.o_proj.weight': 'blk.{l}.attn_output.weight',
  'model.layers.{l}.post_attention_layernorm.weight': 'blk.{l}.ffn_norm.weight',
  'model.layers.{l}.mlp.gate_proj.weight': 'blk.{l}.ffn_gate.weight',
  'model.layers.{l}.mlp.up_proj.weight': 'blk.{l}.ffn_up.weight',
  'model.layers.{l}.mlp.down_proj.weight': 'blk.{l}.ffn_down.weight',
  'model.norm.weight': 'output_norm.weight',
  'lm_head.weight': 'output.weight',
}


def config_from_gguf(field, has_tensor) -> dict:
  """The config.json that the checkpoint would have had. field(key, default): metadata; has_tensor(gguf name) -> bool."""
  if (scaling := field('rope.scaling.type', 'none')) != 'none' or has_tensor('rope_freqs.weight'):
    raise InputError(f'GGUF rope scaling ({scaling}) is not supported; use the Hugging Face folder of this model.')
  d_model, heads = field('embedding_length'), field('attention.head_count')
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': field('vocab_size'),
    'hidden_size': d_model,
    'intermediate_size': field('feed_forward_length'),
    'num_hidden_layers': field('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': field('attention.head_count_kv', heads),
    'head_dim': field('attention.key_length', d_model // heads if heads else None),
    'hidden_act': 'silu',
    'max_position_embeddings': field('context_length'),
    # float32 in the file; to the shortest decimal that is the same float32.
    'rms_norm_eps': float(str(np.float32(field('attention.layer_norm_rms_epsilon')))),
    'rope_theta': float(field('rope.freq_base', 10000.0)),
    'attention_bias': False,
    'mlp_bias': False,
    'tie_word_embeddings': not has_tensor('output.weight'),
  }


def from_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """A dequantised tensor as Hugging Face has it: llama.cpp interleaves the rotary halves of q's and k's rows."""
  for part, heads in (('.q_proj.', 'num_attention_heads'), ('.k_proj.', 'num_key_value_heads')):
    if part in name:
      n = config[heads]
      return weight.reshape(n, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
  return weight
