"""Fuzz tests: whatever is in a checkpoint's headers, opening it succeeds or raises InputError with one sentence.

1,000 cases, the same in every run. hypothesis prints how to reproduce a failure.
"""

import json
import os
import pathlib
import resource
import signal

import gguf
from gguf_files import CASES
from gguf_files import SIZES
from gguf_files import write_gguf
import hypothesis
from hypothesis import strategies as st
import pytest
from tiny import write_tiny_llama
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf.source import open_source

SECONDS = 20  # for one case, on a busy machine
MEMORY = 4 * 2**30  # bytes beyond what the process uses at the start


@pytest.fixture(scope='module', autouse=True)
def little_memory():
  """Limits memory, so that a case that takes too much fails without harming the machine."""
  size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
  before = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(cases: int):
  return hypothesis.settings(
    max_examples=cases // 20 if os.environ['ELDER_JAX_QUICK'] == '1' else cases,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
  )


class Hangs(BaseException):
  pass


def opens_or_raises_input_error(path: pathlib.Path):
  """Opens a checkpoint and reads its tensors. Any exception but an InputError of one line is a failure."""
  around = path if path.is_dir() else path.parent
  before = {p for p in around.parent.rglob('*') if 'scratch' not in p.parts}

  def late(*_):
    raise Hangs(f'{path} took more than {SECONDS} s')

  signal.signal(signal.SIGALRM, late)
  signal.alarm(SECONDS)
  try:
    source = open_source(str(path), around / 'scratch')
    for name in source.shapes:
      source.read(name)
  except InputError as e:
    assert '\n' not in str(e) and str(e).endswith('.'), str(e)
  finally:
    signal.alarm(0)
  assert {p for p in around.parent.rglob('*') if 'scratch' not in p.parts} == before


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A tiny model of some families; each test damages files and restores them."""
  found = {'llama': write_tiny_llama(tmp_path_factory.mktemp('llama'), shard='20KB')}
  for kind in ('qwen2', 'gemma3_text', 'gpt2', 'gpt_neox', 'opt', 'smollm3'):
    sizes = dict(
      vocab_size=64, num_hidden_layers=3, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=None
    )
    sizes |= dict(n_embd=16, n_head=2, n_layer=3) if kind == 'gpt2' else dict(hidden_size=16)
    sizes |= dict(ffn_dim=32, word_embed_proj_dim=16) if kind == 'opt' else {}
    sizes |= dict(intermediate_size=32) if kind not in ('opt', 'gpt2') else {}
    sizes |= dict(num_key_value_heads=1) if kind in ('qwen2', 'gemma3_text', 'smollm3') else {}
    folder = tmp_path_factory.mktemp(kind)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    found[kind] = folder
  return found


SCALARS = (
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.integers(-4, 70)
  | st.floats()
  | st.text(max_size=12)
  | st.sampled_from(['silu', 'gelu', 'full_attention', 'sliding_attention', 'linear', 'llama3', 'default', 10**400])
)
VALUES = st.recursive(
  SCALARS,
  lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
  max_leaves=8,
)
MORE_KEYS = [
  'rope_scaling',
  'rope_parameters',
  'rope_theta',
  'head_dim',
  'layer_types',
  'sliding_window',
  'max_window_layers',
  'use_sliding_window',
  'no_rope_layers',
  'no_rope_layer_interval',
  'sliding_window_pattern',
  'rotary_pct',
  'partial_rotary_factor',
  'query_pre_attn_scalar',
  'quantization_config',
  'model_type',
  'n_inner',
  'num_experts',
]
ROPES = st.fixed_dictionaries(
  {'rope_type': st.sampled_from(['default', 'linear', 'llama3', 'yarn', [], None])},
  optional={
    key: SCALARS
    for key in (
      'factor',
      'low_freq_factor',
      'high_freq_factor',
      'original_max_position_embeddings',
      'rope_theta',
      'odd',
    )
  },
)


@fuzz(400)
@hypothesis.given(data=st.data())
def test_config_fields(folders, data):
  folder = folders[data.draw(st.sampled_from(sorted(folders)))]
  text = (folder / 'config.json').read_text()
  config = json.loads(text)
  for _ in range(data.draw(st.integers(1, 3))):
    key = data.draw(st.sampled_from(sorted(config) + MORE_KEYS) | st.text(max_size=10))
    if data.draw(st.integers(0, 5)) == 0:
      config.pop(key, None)
    else:
      config[key] = data.draw(ROPES if key in ('rope_scaling', 'rope_parameters') else VALUES)
  try:
    (folder / 'config.json').write_text(json.dumps(config))
    opens_or_raises_input_error(folder)
  finally:
    (folder / 'config.json').write_text(text)


@fuzz(200)
@hypothesis.given(data=st.data())
def test_index_files(folders, data):
  index = folders['llama'] / 'model.safetensors.index.json'
  before = index.read_bytes()
  files = [
    *sorted({p.name for p in index.parent.glob('*.safetensors')}),
    '../x',
    '/etc/passwd',
    '.',
    '',
    'a\\b',
    'config.json',
  ]
  how = data.draw(st.sampled_from(['bytes', 'value', 'map']))
  if how == 'bytes':
    content = bytearray(before)
    for _ in range(data.draw(st.integers(1, 4))):
      content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    after = bytes(content)
  elif how == 'value':
    after = json.dumps(data.draw(VALUES | st.fixed_dictionaries({'weight_map': VALUES}))).encode()
  else:
    content = json.loads(before)
    for _ in range(data.draw(st.integers(1, 3))):
      name = data.draw(st.sampled_from(sorted(content['weight_map'])) | st.text(max_size=10))
      content['weight_map'][name] = data.draw(st.sampled_from(files) | SCALARS)
    after = json.dumps(content).encode()
  try:
    index.write_bytes(after)
    opens_or_raises_input_error(index.parent)
  finally:
    index.write_bytes(before)


def damaged(content: bytes, head: int, data) -> bytes:
  """Changes bytes, writes numbers, and deletes or inserts pieces within the first `head` bytes; or cuts off the end."""
  content = bytearray(content)
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, head - 1))
    how = data.draw(st.sampled_from(['byte', 'number', 'cut', 'insert', 'end']))
    if how == 'byte':
      content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
    elif how == 'number':
      size = data.draw(st.sampled_from([4, 8]))
      number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
      content[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, 'little')
    elif how == 'cut':
      del content[at : at + data.draw(st.integers(1, 40))]
    elif how == 'insert':
      content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    else:
      del content[data.draw(st.integers(0, len(content))) :]
      head = max(1, min(head, len(content)))
      if not content:
        return b''
  return bytes(content)


@fuzz(200)
@hypothesis.given(data=st.data())
def test_safetensors_headers(folders, data):
  path = folders['gpt2'] / 'model.safetensors'
  before = path.read_bytes()
  size = int.from_bytes(before[:8], 'little')
  if data.draw(st.booleans()):
    header = json.loads(before[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()) or name == '__metadata__':
      header[name] = data.draw(VALUES)
    else:
      header[name][data.draw(st.sampled_from(['dtype', 'shape', 'data_offsets']))] = data.draw(
        VALUES | st.lists(st.integers(0, 2**65), max_size=4) | st.sampled_from(['F64', 'I64', 'F8_E4M3', 'BOOL', 'F16'])
      )
    text = json.dumps(header).encode()
    after = len(text).to_bytes(8, 'little') + text + before[8 + size :]
  else:
    after = damaged(before, 8 + size, data)
  try:
    path.write_bytes(after)
    opens_or_raises_input_error(path.parent)
  finally:
    path.write_bytes(before)


@pytest.fixture(scope='module')
def gguf_file(tmp_path_factory) -> tuple[pathlib.Path, int]:
  """A GGUF file and the length of its header."""
  folder = tmp_path_factory.mktemp('gguf')
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model('gemma3_text', **SIZES | CASES['gemma3_text'] | dict(num_hidden_layers=1))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / 'in')
  path = write_gguf(folder / 'm.gguf', folder / 'in')
  return path, int(gguf.GGUFReader(path).data_offset)


@fuzz(200)
@hypothesis.given(data=st.data())
def test_gguf_headers(gguf_file, data):
  path, head = gguf_file
  before = path.read_bytes()
  try:
    path.write_bytes(damaged(before, head, data))
    opens_or_raises_input_error(path)
  finally:
    path.write_bytes(before)
