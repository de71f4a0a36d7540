"""Qwen3, dense: Llama with norms on queries and keys."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import qwen2
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Qwen3, dense'
WEIGHTS = llama.WEIGHTS
pruned = qwen2.pruned


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""

  def features(fields: Fields) -> dict:
    bias = fields.flag('attention_bias')
    return dict(qk_norm=True, qkv_bias=bias, out_bias=bias)

  return qwen2.read({'head_dim': 128} | config, 'qwen3', features)


GGUF_ARCHITECTURE = 'qwen3'
GGUF_NAMES = llama.GGUF_NAMES | {
  f'model.layers.{{l}}.self_attn.{p}_norm.weight': f'blk.{{l}}.attn_{p}_norm.weight' for p in 'qk'
}
from_gguf, to_gguf = qwen2.from_gguf, qwen2.to_gguf


def config_from_gguf(field, tensors: dict) -> dict:
  """As llama.config_from_gguf."""
  return llama.gguf_config(field, tensors) | {
    'architectures': ['Qwen3ForCausalLM'],
    'model_type': 'qwen3',
    'attention_bias': False,
    'use_sliding_window': False,
  }
