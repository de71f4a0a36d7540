"""The model families that can be read and written: `model_type` in config.json -> module.

A family module has `spec_from_config`, `WEIGHTS`, and for GGUF `GGUF_ARCHITECTURE`, `GGUF_NAMES`,
`config_from_gguf` and `from_gguf`. Only family modules know Hugging Face's and llama.cpp's names.
"""

from elder_jax.families import llama

FAMILIES = {'llama': llama}
