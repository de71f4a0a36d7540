"""Layers are cut from GGUF files: tensors byte for byte, metadata as llama.cpp reads it."""

import json
import pathlib

import gguf
from gguf_files import CASES
from gguf_files import SIZES
from gguf_files import write_gguf
import jax
import numpy as np
import pytest
from tiny import config_of
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf.gguf import cut
from elder_jax.hf.gguf import header
from elder_jax.hf.gguf import write as writer
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model import pruning
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import series
from elder_jax.run import workdir

pytestmark = pytest.mark.filterwarnings('ignore')
KINDS = ['llama', 'llama, scaled', 'qwen2', 'qwen3', 'gemma3_text']


def make(kind: str, folder: pathlib.Path, **how) -> pathlib.Path:
  torch.manual_seed(0)
  sizes = SIZES | dict(num_hidden_layers=8) | {k: v for k, v in CASES[kind].items() if k != 'num_hidden_layers'}
  config = transformers.AutoConfig.for_model(kind.partition(',')[0], **sizes)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  return write_gguf(folder.with_suffix('.gguf'), folder, **how)


def run(path: pathlib.Path, work: pathlib.Path, removed, **more) -> pathlib.Path:
  settings = dict(model=str(path), workdir=str(work), remove_layers=removed, recipe='none', compare=())
  report = series.run(config_of(**settings | dict(export_format='gguf') | more))
  assert report['removed'] == removed and report['format'] == 'gguf'
  [made] = (work / 'export').glob('*.gguf')
  return made


def logits(path: pathlib.Path, removed=()) -> np.ndarray:
  model = load_model(open_source(str(path), path.parent / f'{path.stem}-files'), 'float32')
  model = pruning.prune(model, list(removed)) if removed else model
  tokens_BT = np.random.default_rng(0).integers(2, 200, (2, 24), np.int32)
  with jax.default_matmul_precision('highest'):
    return np.asarray(logits_of(model, forward(model, tokens_BT)[0]))


@pytest.mark.parametrize('kind', KINDS)
def test_the_cut_file_computes_bit_for_bit_what_the_pruned_model_does(kind, tmp_path):
  path = make(kind, tmp_path / 'model', quantize=gguf.GGMLQuantizationType.Q4_1)
  made = run(path, tmp_path / 'work', [1, 4])
  assert made.name == 'model-6-layers.gguf'
  np.testing.assert_array_equal(logits(made), logits(path, [1, 4]))
  before, after = header.read_raw(path), header.read_raw(made)
  architecture = before[0]['general.architecture']
  changed = {k for k in after[1] if after[1][k] != before[1].get(k)}
  pattern = {'gemma3.attention.sliding_window_pattern'} if kind == 'gemma3_text' else set()
  assert changed == {f'{architecture}.block_count'} | pattern and before[1].keys() - after[1].keys() == set()
  expected = {t.name: (t.shape, t.tensor_type, t.data.tobytes()) for t in before[2]}
  for tensor in after[2]:
    name = tensor.name
    if name.startswith('blk.'):
      _, l, rest = name.split('.', 2)
      name = f'blk.{[0, 2, 3, 5, 6, 7][int(l)]}.{rest}'
    assert (tensor.shape, tensor.tensor_type, tensor.data.tobytes()) == expected[name]
  assert len(after[2]) == sum(not t.name.startswith(('blk.1.', 'blk.4.')) for t in before[2])
  read = gguf.GGUFReader(made)  # the gguf package reads the same
  assert [t.name for t in read.tensors] == [t.name for t in after[2]]
  assert {t.name: t.data.tobytes() for t in read.tensors} == {t.name: t.data.tobytes() for t in after[2]}
  assert f'llama-server -m {made.name}' in (made.parent / 'README.md').read_text()
  assert json.loads((made.parent / 'elder_jax.json').read_text())['lineage'][-1]['removed'] == [1, 4]


def test_the_default_pattern_of_llama_cpp_is_not_written(tmp_path):
  path = make('gemma3_text', tmp_path / 'model')
  made = run(path, tmp_path / 'work', [6, 7])
  assert 'gemma3.attention.sliding_window_pattern' not in header.read(made)[0]
  np.testing.assert_array_equal(logits(made), logits(path, [6, 7]))


def opened(architecture: str, depth: int, **fields) -> cut.Opened:
  """A file with metadata only."""
  values = {'general.architecture': architecture, f'{architecture}.block_count': depth}
  values |= {f'{architecture}.{name.replace("__", ".")}': value for name, value in fields.items()}

  def raw(value) -> bytes:
    return writer.flags(value) if isinstance(value, list) else writer.uint32(value if isinstance(value, int) else 0)

  return cut.Opened(pathlib.Path('x.gguf'), values, {k: raw(v) for k, v in values.items()}, [])


def test_counts_arrays_and_extra_layers():
  file = opened(
    'qwen3moe',
    6,
    nextn_predict_layers=1,
    leading_dense_block_count=2,
    attention__head_count_kv=[True, False, True, True, False, True],
    rope__dimension_sections=[True] * 6,
  )
  assert file.depth == 5
  raw = cut.cut_fields(file, [0, 2, 4])
  assert raw['qwen3moe.block_count'] == writer.uint32(4)
  assert raw['qwen3moe.leading_dense_block_count'] == writer.uint32(1)
  assert raw['qwen3moe.attention.head_count_kv'] == writer.flags([True, True, False, True])
  assert raw['qwen3moe.rope.dimension_sections'] == file.raw['qwen3moe.rope.dimension_sections']
  assert [cut.renamed(f'blk.{l}.x', [0, 2, 4, 5]) for l in range(6)] == [
    'blk.0.x',
    None,
    'blk.1.x',
    None,
    'blk.2.x',
    'blk.3.x',
  ]


def test_the_window_of_each_layer_is_written_if_llama_cpp_derives_it_from_the_number():
  raw = cut.cut_fields(opened('gemma2', 8), [0, 1, 2, 4, 5, 7])
  assert raw['gemma2.attention.sliding_window_pattern'] == writer.flags([True, False, True, True, False, False])
  assert 'gemma2.attention.sliding_window_pattern' not in cut.cut_fields(opened('gemma2', 8), [0, 1, 2, 3])
  raw = cut.cut_fields(
    opened('cohere2', 8, attention__sliding_window=16, attention__sliding_window_pattern=2), [0, 2, 3]
  )
  assert raw['cohere2.attention.sliding_window_pattern'] == writer.flags([True, True, False])
  assert 'olmo2.attention.sliding_window_pattern' not in cut.cut_fields(opened('olmo2', 8), [1, 2])  # it has no window
  given = opened('gemma3', 4, attention__sliding_window=8, attention__sliding_window_pattern=[True, False, True, True])
  assert cut.cut_fields(given, [1, 3])['gemma3.attention.sliding_window_pattern'] == writer.flags([False, True])


@pytest.mark.parametrize(
  ('architecture', 'fields', 'sentence'),
  [
    ('gemma3', dict(depth=62), 'computes gemma3 with 62 layers in another way than with 60'),
    ('llama', dict(interleave_moe_layer_step=2), 'unknown field llama.interleave_moe_layer_step=2 may describe layers'),
    ('llama', dict(attention__head_count_kv=[True] * 3), 'head_count_kv=.* may describe layers'),
    ('granite', dict(deepstack_mapping=[True] * 8), 'deepstack_mapping=.* may describe layers'),
  ],
)
def test_metadata_that_cannot_describe_the_remaining_layers_is_refused(architecture, fields, sentence):
  file = opened(architecture, fields.pop('depth', 8), **fields)
  with pytest.raises(InputError, match=sentence):
    cut.cut_fields(file, list(range(file.depth - 2)))


def test_refusals_of_the_command(tmp_path, monkeypatch):
  path = make('llama', tmp_path / 'model')
  with pytest.raises(InputError, match='export_format=gguf.*cut from a .gguf file'):
    run(path, tmp_path / 'work', [1], recipe='absorb', train_data=('x',))
  with pytest.raises(InputError, match='export_format=gguf.*cut from a .gguf file'):
    run(tmp_path / 'model', tmp_path / 'work', [1])
  with pytest.raises(InputError, match='remove_layers.*the model has no layer 8; give layers from 0 to 7'):
    run(path, tmp_path / 'work', [8])
  with pytest.raises(InputError, match='tokenizer=x: a .gguf file has its own'):
    run(path, tmp_path / 'work', [1], tokenizer='x')
  assert not (tmp_path / 'work').exists()
  monkeypatch.setattr(
    workdir, 'record', None
  )  # an unsupported architecture is reported before the work folder is claimed
  monkeypatch.delitem(cut.PERIODS, 'llama')
  with pytest.raises(InputError, match='layers of the architecture llama cannot be cut'):
    run(path, tmp_path / 'work', [1])
