"""The model families that can be read and written: `model_type` in config.json -> module.

A family module has `MODELS`, their names for docs/models.md (and `RUN`, those of which real weights were pruned
here), `spec_from_config` and `WEIGHTS` (llama.py says how to read it). Where it differs: `pruned`, if a removal of
layers changes keys of config.json beside the depth and lists with an entry per layer; `DEPTH`, if the key of the
depth is not num_hidden_layers; `ROPE_KEYS`, if what rope_parameters holds has had other names outside; `ROPE_LOCAL`,
the name there of the base of layers with a window; `ONLY`, which tensors only one kind of layer has. The first row of
WEIGHTS is the embedding; files may leave the first part of its name out of all names. For GGUF: `GGUF_ARCHITECTURE`,
`GGUF_NAMES`, `config_from_gguf`, `from_gguf`, `to_gguf`, and `GGUF_DERIVED` for a tensor that only config_from_gguf
looks at. Only family modules know Hugging Face's and llama.cpp's names. docs/adding_a_family.md says how to add one.
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
