"""Llama 1, 2, 3 and models of the same architecture (SmolLM2, TinyLlama, Vicuna …); and what related families share."""

import numpy as np

from elder_jax.errors import InputError
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Llama 1 to 3.2 (text), SmolLM2, TinyLlama, Vicuna, Falcon 3'
RUN = 'SmolLM2 135M; 7B with random weights loaded and saved'
# Hugging Face name -> (path in model.Decoder, rule 'HF->ours'), for reading and writing. A comma separates dimensions on
# the HF side; letters without one are folded into one dimension. The leading L of stacked layers is omitted. Rows whose
# parameter the Decoder does not have are ignored. None: a buffer, which is skipped on reading and not written.
WEIGHTS = {
  'model.embed_tokens.weight': ('embed', 'V,D->VD'),
  'model.layers.{l}.input_layernorm.weight': ('layers.attn_norm.scale', 'D->D'),
  'model.layers.{l}.self_attn.q_proj.weight': ('layers.wq', 'NH,D->DNH'),
  'model.layers.{l}.self_attn.q_proj.bias': ('layers.bq', 'NH->NH'),
  'model.layers.{l}.self_attn.k_proj.weight': ('layers.wk', 'KH,D->DKH'),
  'model.layers.{l}.self_attn.k_proj.bias': ('layers.bk', 'KH->KH'),
  'model.layers.{l}.self_attn.v_proj.weight': ('layers.wv', 'KH,D->DKH'),
  'model.layers.{l}.self_attn.v_proj.bias': ('layers.bv', 'KH->KH'),
  'model.layers.{l}.self_attn.q_norm.weight': ('layers.q_norm.scale', 'H->H'),
  'model.layers.{l}.self_attn.k_norm.weight': ('layers.k_norm.scale', 'H->H'),
  'model.layers.{l}.self_attn.o_proj.weight': ('layers.wo', 'D,NH->NHD'),
  'model.layers.{l}.self_attn.o_proj.bias': ('layers.bo', 'D->D'),
  'model.layers.{l}.self_attn.rotary_emb.inv_freq': None,
  'model.layers.{l}.self_attn.rotary_emb.cos_cached': None,
  'model.layers.{l}.self_attn.rotary_emb.sin_cached': None,
  'model.rotary_emb.inv_freq': None,
  'model.layers.{l}.post_attention_layernorm.weight': ('layers.mlp_norm.scale', 'D->D'),
  'model.layers.{l}.mlp.gate_proj.weight': ('layers.w_gate', 'F,D->DF'),
  'model.layers.{l}.mlp.gate_proj.bias': ('layers.b_gate', 'F->F'),
  'model.layers.{l}.mlp.up_proj.weight': ('layers.w_up', 'F,D->DF'),
  'model.layers.{l}.mlp.up_proj.bias': ('layers.b_up', 'F->F'),
  'model.layers.{l}.mlp.down_proj.weight': ('layers.w_down', 'D,F->FD'),
  'model.layers.{l}.mlp.down_proj.bias': ('layers.b_down', 'D->D'),
  'model.norm.weight': ('final_norm.scale', 'D->D'),
  'lm_head.weight': ('head', 'V,D->VD'),
}


def sizes(fields: Fields, activation: str = 'hidden_act', default: str = 'silu') -> dict:
  """Arguments of Spec that all relatives of Llama share."""
  return dict(
    vocab_size=fields.size('vocab_size'),
    d_ff=fields.size('intermediate_size'),
    norm_eps=fields.number('rms_norm_eps', 1e-6),
    tied=fields.flag('tie_word_embeddings'),
    activation=fields.activation(activation, default),
    **fields.heads(),
  )


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  fields.only('sliding_window', None)
  fields.one_kind(0)
  size, bias = sizes(fields), fields.flag('attention_bias')
  table = fields.rope(size['head_dim'])
  spec = Spec(**size, **rope.features(table), qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag('mlp_bias'))
  return spec, fields.done('llama')


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
GGUF_DERIVED = 'rope_freqs.weight'  # config_from_gguf converts it to rope scaling


def config_from_gguf(field, tensors: dict) -> dict:
  """config.json of the checkpoint that a GGUF file was made from.

  Args:
    field: field(key[, default]) returns a metadata field of this architecture.
    tensors: GGUF name -> header.Tensor.

  Raises:
    InputError: a field is missing or not supported.
  """
  config = gguf_config(field, tensors) | {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'attention_bias': False,
    'mlp_bias': False,
  }
  if GGUF_DERIVED in tensors:
    if config['rope_scaling']:
      raise InputError(
        f'{GGUF_DERIVED} together with rope scaling is not supported; use the Hugging Face folder of this model.'
      )
    config['rope_scaling'] = _llama3_scaling(config, tensors[GGUF_DERIVED].data)
  return config


def gguf_config(field, tensors: dict) -> dict:
  """Keys of config.json that all relatives of Llama share. For a field that is absent, llama.cpp's default."""
  heads = field('attention.head_count')
  head_dim = field('attention.key_length', gguf_head_dim(field))
  for name in ('attention.value_length', 'rope.dimension_count'):
    if (value := field(name, head_dim)) != head_dim:
      raise InputError(
        f'the GGUF field {name} is {value}, but only the head width, {head_dim}, is supported; use the Hugging Face '
        'folder of this model.'
      )
  return {
    'vocab_size': field('vocab_size'),
    'hidden_size': field('embedding_length'),
    'intermediate_size': field('feed_forward_length'),
    'num_hidden_layers': field('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': field('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': field('context_length'),
    'rms_norm_eps': gguf_float(field('attention.layer_norm_rms_epsilon')),
    'rope_theta': float(field('rope.freq_base', 10000.0)),
    'rope_scaling': _gguf_rope_scaling(field),
    'tie_word_embeddings': 'output.weight' not in tensors,
  }


@np.errstate(over='ignore')  # Fields refuses infinite values
def gguf_float(value) -> float:
  """A float32 of the file as the shortest decimal that rounds to it."""
  return float(str(np.float32(value)))


def _gguf_rope_scaling(field) -> dict | None:
  """As in llama.cpp: a factor without a type is linear; rope.scale_linear is the old name of the factor."""
  kind = field('rope.scaling.type', 'linear')
  factor = field('rope.scaling.factor', field('rope.scale_linear', 0))
  if kind not in ('none', 'linear'):
    raise InputError(f'GGUF rope scaling ({kind}) is not supported; use the Hugging Face folder of this model.')
  return None if kind == 'none' or factor in (0, 1) else {'rope_type': 'linear', 'factor': gguf_float(factor)}


def gguf_head_dim(field) -> int | None:
  """llama.cpp's default width of a head."""
  heads = field('attention.head_count')
  return field('embedding_length') // heads if heads else None


def _llama3_scaling(config: dict, divisor_R: np.ndarray) -> dict:
  """Llama 3.1's rope scaling, recovered from `divisor_R`, the divisor of each frequency.

  The file holds only the divisors. The other settings are those of the published config.json.
  """
  scaling = {
    'rope_type': 'llama3',
    'factor': float(divisor_R.max()),
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  plain_R, scaled_R = (np.array(rope.table(config['head_dim'], config['rope_theta'], s).freq_H) for s in ({}, scaling))
  if divisor_R.shape != plain_R.shape or not np.allclose(plain_R / scaled_R, divisor_R, rtol=1e-5):
    raise InputError(f"{GGUF_DERIVED} does not have Llama 3.1's values; use the Hugging Face folder of this model.")
  return scaling


def from_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """A dequantised tensor in Hugging Face's layout: llama.cpp interleaves the rotary halves of the rows of q and k."""
  for part, heads in (('.q_proj.', 'num_attention_heads'), ('.k_proj.', 'num_key_value_heads')):
    if part in name:
      n = config[heads]
      return weight.reshape(n, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
  return weight


def to_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """The inverse of from_gguf."""
  for part, heads in (('.q_proj.', 'num_attention_heads'), ('.k_proj.', 'num_key_value_heads')):
    if part in name:
      n = config.get(heads) or config['num_attention_heads']
      return weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
  return weight
