"""Tiny models from which several tests make GGUF files; read only."""

import pathlib

from gguf_files import CASES
from gguf_files import FAMILIES
from gguf_files import SIZES
from gguf_files import VOCAB
import pytest
from tiny import write_tiny_llama
import torch
import transformers


@pytest.fixture(scope='session')
def two_layers(tmp_path_factory) -> pathlib.Path:
  return write_tiny_llama(tmp_path_factory.mktemp('two'), vocab_size=VOCAB, intermediate_size=64, num_hidden_layers=2)


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A tiny model of each family with GGUF support."""
  found = {}
  for kind in FAMILIES:
    found[kind] = tmp_path_factory.mktemp(kind)
    config = transformers.AutoConfig.for_model(kind, **SIZES | CASES[kind] | dict(num_hidden_layers=1))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(found[kind])
  return found
