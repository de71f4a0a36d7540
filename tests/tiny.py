"""Tiny random models and other helper functions of the tests; the fixtures are in conftest.py."""

from collections.abc import Callable
import math
import pathlib

import jax
import numpy as np
import pytest

from elder_jax import methods
from elder_jax.commands.flags import value_of
from elder_jax.devices import preemption
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Spec
from elder_jax.recipes.context import Context
from elder_jax.run import pipeline
from elder_jax.run.config import Config
from elder_jax.run.config import all_fields
from elder_jax.settings import types_of
from elder_jax.training.batches import Batches


def slow(*case):
  """A case of pytest.mark.parametrize that only `make test-all` runs."""
  return pytest.param(*case, marks=pytest.mark.slow)


class Endless:
  """Batches that are computed from the step."""

  def __init__(self, batch: Callable):
    self._batch = batch

  def __getitem__(self, step: int):
    return self._batch(step)


def choose(name: str, model, num_remove: int, batches, mode, seed: int = 0):
  """Returns the choice of a method that reads all batches."""
  config = config_of(seed=seed, score_steps=max(1, len(batches)), num_sequences=4 * max(2, len(batches)))
  return methods.choose(name, Context(model, batches, config, mode), num_remove)


def config_of(**settings) -> Config:
  """Makes a Config. Values may be text, as on the command line."""
  return Config.of(**{name: _value(name, value) for name, value in settings.items()})


def tiny_spec(**features) -> Spec:
  """A Spec like Llama's, changed by `features`."""
  llama = dict(
    vocab_size=40,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=24,
    norm_eps=1e-5,
    tied=True,
    rope_freq_RH=((1.0, 0.1),),
  )
  return Spec(**llama | features)


def tiny_decoder(num_layers: int = 6, **features) -> Decoder:
  """A random model like Llama, changed by `features` of Spec."""
  return Decoder(tiny_spec(**features), num_layers, jax.random.key(0))


def named(tree) -> dict:
  """Returns {path: leaf}."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaves(tree) -> dict[str, np.ndarray]:
  """Returns {path: copy of the leaf}."""
  return {name: np.array(leaf) for name, leaf in named(tree).items()}


def load(folder) -> Decoder:
  return load_model(open_source(str(folder), folder), 'float32')


def names(folder) -> list[str]:
  return sorted(p.name for p in pathlib.Path(folder).iterdir())


def _value(name: str, value):
  field = all_fields().get(name)
  if name == 'eval_data' and not isinstance(value, dict):
    return {entry.partition('=')[0]: entry.partition('=')[2] for entry in value if entry}
  if field is None or not isinstance(value, str) or str in types_of(field):
    return value
  try:
    return value_of(field, value)
  except ValueError as e:
    raise InputError(name, value, f'{e}.') from e


TINY = dict(
  vocab_size=263,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=6,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  tie_word_embeddings=True,
  bos_token_id=0,
  eos_token_id=1,
)


def write_tokenizer(folder: pathlib.Path):
  """Writes a byte-level tokenizer with 258 tokens, a chat template and a licence file."""
  import tokenizers
  from tokenizers import decoders
  from tokenizers import models
  from tokenizers import pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {t: i for i, t in enumerate(['<s>', '</s>', *alphabet])}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<s>', '</s>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(
    '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}'
  )
  (folder / 'chat_template.jinja').write_text('{% for m in messages %}{{ m.content }}\n{% endfor %}')
  (folder / 'LICENSE').write_text('Free for all.\n')


def write_tiny_llama(folder: pathlib.Path, dtype: str = 'float32', shard: str = '5GB', **config) -> pathlib.Path:
  """Writes a random Llama with transformers. Its weights are large enough that every layer matters."""
  import torch
  import transformers

  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, 'initializer_range': 0.2, **config}))
  for name, parameter in model.named_parameters():
    if 'norm' in name:  # all ones by default, where a swap would not be noticed
      torch.nn.init.uniform_(parameter, 0.5, 1.5)
  model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
  write_tokenizer(folder)
  return folder


def without_additions(config: dict, before: dict) -> dict:
  """Returns an exported config.json without the keys added for transformers 4, which `before` has in rope_parameters."""
  added = {
    'rope_theta',
    'rope_scaling',
    'rope_local_base_freq',
    'partial_rotary_factor',
    'rotary_emb_base',
    'rotary_pct',
  }
  assert config.keys() - before.keys() <= added and ('rope_parameters' in before or config.keys() == before.keys())
  return {key: value for key, value in config.items() if key in before}


def stop_at_batch(monkeypatch, number: int, settings: dict):
  """Starts a run and stops it, as a signal would, when it reads its batch number `number`."""
  taken, batch = [], Batches.__getitem__

  def stopping(self, step):
    taken.append(step)
    monkeypatch.setattr(preemption, '_signalled', len(taken) == number)
    return batch(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(Batches, '__getitem__', stopping)
    with pytest.raises(preemption.Preempted):
      pipeline.run(config_of(**settings))
  monkeypatch.setattr(preemption, '_signalled', False)


def on_one_and_eight(model: Decoder, batches: list, devices: list, f: Callable) -> list:
  """Returns f(model, batches) on one device and on eight with [data, fsdp, tp] = [2, 2, 2]."""
  found = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(sizes, devices[: math.prod(sizes)])
    with jax.set_mesh(mesh):
      there = jax.tree.map(jax.device_put, model, sharding.for_model(model, mesh, sizes))
      found.append(f(there, [sharding.put_batch(batch, mesh) for batch in batches]))
  return found
