"""Qwen2 and 2.5, dense: Llama with biases on queries, keys and values."""

import numpy as np

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Qwen2, Qwen2.5'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  return read(config, 'qwen2', lambda fields: dict(qkv_bias=True))


def read(config: dict, family: str, features) -> tuple[Spec, int]:
  """What Qwen2 and Qwen3 share; features(fields) returns the arguments of Spec that differ."""
  fields = Fields({'num_key_value_heads': 32, 'sliding_window': 4096} | config)
  size = llama.sizes(fields)
  window = fields.window('sliding_window', fields.flag('use_sliding_window'))
  first = fields.whole('max_window_layers', 28)
  kinds = fields.layer_kinds(lambda l: 'sliding_attention' if window and l >= first else 'full_attention')
  window_L = tuple(window if kind == 'sliding_attention' else 0 for kind in kinds)
  spec = Spec(**size, **rope.features(fields.rope(size['head_dim'])), window_L=window_L, **features(fields))
  return spec, fields.done(family)


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  first = Fields(config).whole('max_window_layers', 28)
  return {'max_window_layers': sum(l < first for l in kept)}


GGUF_ARCHITECTURE = 'qwen2'
GGUF_NAMES = llama.GGUF_NAMES | {
  f'model.layers.{{l}}.self_attn.{p}_proj.bias': f'blk.{{l}}.attn_{p}.bias' for p in 'qkv'
}


def config_from_gguf(field, tensors: dict) -> dict:
  """As llama.config_from_gguf."""
  own = {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'use_sliding_window': False}
  return llama.gguf_config(field, tensors) | own


def from_gguf(name: str, weight: np.ndarray, config: dict) -> np.ndarray:
  """llama.cpp stores these tensors as Hugging Face does."""
  del name, config
  return weight


to_gguf = from_gguf
