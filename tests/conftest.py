"""Tiny random models and texts that all tests share. Golden tests need torch and fail without it."""

import pathlib
import shutil

import jax
import pytest

from elder_jax.hf import checkpoint_hf
from elder_jax.run import pipeline
from elder_jax.text import data

jax.config.update('jax_numpy_rank_promotion', 'raise')

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
  """A byte-level tokenizer of 258 tokens, with a chat template and a licence file beside it."""
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
  """A random Llama as transformers saves it, weights large enough that every layer matters."""
  import torch
  import transformers

  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, 'initializer_range': 0.2, **config}))
  for name, parameter in model.named_parameters():
    if 'norm' in name:  # else they are all ones and could be swapped unseen
      torch.nn.init.uniform_(parameter, 0.5, 1.5)
  model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
  write_tokenizer(folder)
  return folder


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  """Runs of one shape are compiled once in a session; half of the time of the whole runs goes otherwise into it."""
  jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('jax')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Programs of one module are of no use to the next, and thousands of them take more mappings than a process may have."""
  yield
  jax.clear_caches()


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> pathlib.Path:
  """A tiny Llama's folder; read only."""
  return write_tiny_llama(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> pathlib.Path:
  """Some kilobytes of text; read only."""
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(''.join(f'{i} times {i % 7} is {i * (i % 7)}, and {i} is not {i + 1}.\n' for i in range(400)))
  return path


@pytest.fixture
def settings(tiny, text, tmp_path) -> dict:
  """Settings of a whole run that takes seconds."""
  return dict(
    model=str(tiny),
    method='elder',
    recipe='regularize',
    workdir=str(tmp_path / 'work'),
    train_data=str(text),
    eval_data=(f'text={text}',),
    seq_len=32,
    num_sequences=8,
    batch_size=4,
    eval_seq_len=32,
    eval_tokens=256,
    num_remove=2,
    selection='iterative',
    gate_steps=2,
    order='joint',
    protect_first=1,
    protect_last=1,
    train_steps=3,
    lr=1e-3,
    verify='jax',
  )


@pytest.fixture
def model(tiny, tmp_path, settings) -> pathlib.Path:
  """A copy of the tiny model to damage; `settings` point to it."""
  folder = tmp_path / 'model'
  shutil.copytree(tiny, folder)
  settings['model'] = str(folder)
  return folder


@pytest.fixture
def no_long_work(monkeypatch):
  """Weights are never read here, and no table of a billion rows is made, whatever a config.json says."""
  rows = checkpoint_hf._rows

  def few_rows(family, spec, num_layers):
    assert num_layers < 1000, 'the layers of config.json were believed'
    return rows(family, spec, num_layers)

  monkeypatch.setattr(pipeline, 'load', lambda job: pytest.fail('the bad input was not seen, the model was loaded'))
  monkeypatch.setattr(checkpoint_hf, '_rows', few_rows)


@pytest.fixture
def no_text(monkeypatch):
  """Texts are not read either: what is wrong with flags and checkpoint is told before that."""
  monkeypatch.setattr(data, 'load_tokenizer', lambda name: pytest.fail('the bad input was not seen, text was read'))


@pytest.fixture(scope='module')
def quick_compiler():
  """Half of the time of tests on tiny models is XLA's, for programs that run in no time."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def without_additions(config: dict, before: dict) -> dict:
  """An exported config.json without what is there for version 4 of transformers, which `before` has in rope_parameters."""
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
