"""The model families that can be read and written: `model_type` in config.json -> module.

Every family module has
  MODELS            names of its models, for docs/models.md
  spec_from_config  config.json -> (Spec, number of layers)
  WEIGHTS           its tensors; llama.py explains the format. The first row is the embedding; files may omit the first
                    part of its name from all names.
and, where needed,
  RUN               its models that were pruned here with real weights, for docs/models.md
  pruned            keys of config.json that a removal changes, besides the depth and lists with an entry per layer
  DEPTH             the key of the depth, if not num_hidden_layers
  ROPE_KEYS         older names of the keys in rope_parameters
  ROPE_LOCAL        older name of the rope base of layers with a window
  ONLY              which tensors only one kind of layer has
  GGUF_ARCHITECTURE, GGUF_NAMES, config_from_gguf, from_gguf, to_gguf
  GGUF_DERIVED      a GGUF tensor that only config_from_gguf reads

Only family modules know the names of Hugging Face and llama.cpp. docs/adding_a_family.md explains how to add one.
"""

from elder_jax.hf.families import apertus
from elder_jax.hf.families import cohere2
from elder_jax.hf.families import ernie4_5
from elder_jax.hf.families import exaone4
from elder_jax.hf.families import gemma2
from elder_jax.hf.families import gemma3
from elder_jax.hf.families import glm4
from elder_jax.hf.families import gpt2
from elder_jax.hf.families import gpt_neox
from elder_jax.hf.families import gpt_oss
from elder_jax.hf.families import granite
from elder_jax.hf.families import hunyuan_dense
from elder_jax.hf.families import llama
from elder_jax.hf.families import mistral
from elder_jax.hf.families import mixtral
from elder_jax.hf.families import nemotron
from elder_jax.hf.families import olmo2
from elder_jax.hf.families import olmo3
from elder_jax.hf.families import opt
from elder_jax.hf.families import phi
from elder_jax.hf.families import phi3
from elder_jax.hf.families import qwen2
from elder_jax.hf.families import qwen3
from elder_jax.hf.families import qwen3_5
from elder_jax.hf.families import qwen3_moe
from elder_jax.hf.families import seed_oss
from elder_jax.hf.families import smollm3
from elder_jax.hf.families import starcoder2

FAMILIES = {
  'llama': llama,
  'mistral': mistral,
  'qwen2': qwen2,
  'qwen3': qwen3,
  'gemma2': gemma2,
  'gemma3_text': gemma3,
  'phi': phi,
  'phi3': phi3,
  'opt': opt,
  'gpt2': gpt2,
  'gpt_neox': gpt_neox,
  'smollm3': smollm3,
  'olmo2': olmo2,
  'olmo3': olmo3,
  'exaone4': exaone4,
  'granite': granite,
  'glm4': glm4,
  'cohere2': cohere2,
  'starcoder2': starcoder2,
  'seed_oss': seed_oss,
  'ernie4_5': ernie4_5,
  'hunyuan_v1_dense': hunyuan_dense,
  'apertus': apertus,
  'nemotron': nemotron,
  'mixtral': mixtral,
  'qwen3_moe': qwen3_moe,
  'gpt_oss': gpt_oss,
  'qwen3_5_text': qwen3_5,
}
