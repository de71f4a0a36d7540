"""Checkpoints are read and written: byte for byte, compared with transformers; the check of an export."""

import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import config_of
from tiny import without_additions
from tiny import write_tiny_llama

from elder_jax.hf import verify
from elder_jax.hf.cut import pruned_config
from elder_jax.hf.families import llama
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.model import pruning
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline

BIG = int(5e9)
COPIED = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'LICENSE', 'generation_config.json')


def open_folder(folder: pathlib.Path) -> Source:
  return open_source(str(folder), folder / 'scratch')


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
  result = {}
  for path in sorted(folder.glob('*.safetensors')):
    tensors = safetensors.numpy.load_file(path)
    assert not result.keys() & tensors.keys()
    result |= tensors
  return result


def same_bytes(a: dict, b: dict):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
    assert a[name].tobytes() == b[name].tobytes(), name


def resave(folder: pathlib.Path, change):
  """Applies change(tensors) to the tensors of a folder with one file, in place."""
  tensors = tensors_of(folder)
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def save(folder: pathlib.Path, out: pathlib.Path, removed=(), dtype='float32', shard_bytes=BIG):
  """Loads a model, removes layers and saves it; returns the saved model."""
  source = open_folder(folder)
  model = pruning.prune(load_model(source, dtype), list(removed))
  out.mkdir()
  save_model(
    pieces_of_model(model),
    source,
    pruning.kept_layers(source.num_layers, list(removed)),
    out,
    dtype,
    shard_bytes,
  )
  return model


def load_torch(folder: pathlib.Path):
  """AutoModelForCausalLM, with no tensor missing and none left over."""
  import torch
  import transformers

  model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()


def torch_logits(model, tokens_BT) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def jax_logits(model, tokens_BT):
  return jax.jit(lambda m, t: logits_of(m, forward(m, t)[0]))(model, tokens_BT)


def some_tokens(vocab: int = 263):
  return np.random.default_rng(0).integers(0, vocab, (2, 24), np.int32)


@pytest.fixture(scope='module')
def mild(tmp_path_factory) -> pathlib.Path:
  """A tiny untied Llama whose logits are small enough for a tolerance of 1e-5; read only."""
  return write_tiny_llama(tmp_path_factory.mktemp('mild'), initializer_range=0.1, tie_word_embeddings=False)


# ---- round trips ----


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('source_shard', ['5GB', '20KB'])
def test_keeping_all_layers_writes_the_same_checkpoint(source_shard, tied, dtype, tmp_path):
  folder = write_tiny_llama(tmp_path / 'in', dtype, source_shard, tie_word_embeddings=tied)
  assert (folder / 'model.safetensors.index.json').exists() == (source_shard == '20KB')
  save(folder, tmp_path / 'out', dtype=dtype)
  tensors = tensors_of(tmp_path / 'out')
  same_bytes(tensors, tensors_of(folder))
  assert ('lm_head.weight' in tensors) == (not tied)
  assert [p.name for p in (tmp_path / 'out').glob('*.safetensors*')] == ['model.safetensors']
  after, before = (json.loads((f / 'config.json').read_text()) for f in (tmp_path / 'out', folder))
  assert without_additions(after, before) == before and after['rope_theta'] == 10000.0
  for name in COPIED:
    assert (tmp_path / 'out' / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize('shard_bytes', [20_000, 60_000])
def test_sharded_output(shard_bytes, mild, tmp_path):
  out = tmp_path / 'out'
  save(mild, out, shard_bytes=shard_bytes)
  assert not (out / 'model.safetensors').exists()
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  files = sorted(p.name for p in out.glob('*.safetensors'))
  assert len(files) > 1 and files == [f'model-{i + 1:05d}-of-{len(files):05d}.safetensors' for i in range(len(files))]
  assert sorted(set(index['weight_map'].values())) == files
  total = 0
  for file in files:
    tensors = safetensors.numpy.load_file(out / file)
    assert set(tensors) == {n for n, f in index['weight_map'].items() if f == file}
    size = sum(t.nbytes for t in tensors.values())
    assert size <= shard_bytes or len(tensors) == 1  # one tensor is never split
    total += size
  assert index['metadata']['total_size'] == total
  same_bytes(tensors_of(out), tensors_of(mild))
  logits_BTV, expected_BTV = (torch_logits(load_torch(folder), some_tokens()) for folder in (out, mild))
  np.testing.assert_array_equal(logits_BTV, expected_BTV)
  # We read the same values back.
  chex.assert_trees_all_equal(
    jax.tree.leaves(load_model(open_folder(out), 'float32')),
    jax.tree.leaves(load_model(open_folder(mild), 'float32')),
  )


def test_saving_in_another_type(mild, tmp_path):
  source = open_folder(mild)
  model = load_model(source, 'float32')
  (tmp_path / 'out').mkdir()
  save_model(pieces_of_model(model), source, list(range(6)), tmp_path / 'out', 'bfloat16', BIG)
  got, before = tensors_of(tmp_path / 'out'), tensors_of(mild)
  same_bytes(got, {n: t.astype('bfloat16') for n, t in before.items()})
  config, before = (json.loads((f / 'config.json').read_text()) for f in (tmp_path / 'out', mild))
  assert without_additions(config, before) == {**before, 'dtype': 'bfloat16'}


# ---- two layers removed ----


def test_the_pruned_folder_holds_the_pruned_model(mild, tmp_path):
  out = tmp_path / 'out'
  pruned = save(mild, out, removed=[1, 4])
  reference = load_torch(out)
  assert reference.config.num_hidden_layers == 4 == len(reference.model.layers)
  expected_BTV = jax_logits(pruned, some_tokens())
  assert np.std(expected_BTV) > 0.1
  np.testing.assert_allclose(torch_logits(reference, some_tokens()), expected_BTV, rtol=0, atol=1e-5)
  # The kept layers are those of the source, renumbered.
  before, after = tensors_of(mild), tensors_of(out)
  for new, old in enumerate([0, 2, 3, 5]):

    def of_layer(tensors, l):
      return {n.split(f'.{l}.')[1]: t for n, t in tensors.items() if f'layers.{l}.' in n}

    same_bytes(of_layer(after, new), of_layer(before, old))
  assert not any('layers.4.' in n or 'layers.5.' in n for n in after)

  config, config_before = (json.loads((f / 'config.json').read_text()) for f in (out, mild))
  assert without_additions(config, config_before) == {**config_before, 'num_hidden_layers': 4}
  assert config_before['num_hidden_layers'] == 6
  for name in COPIED:
    assert (out / name).read_bytes() == (mild / name).read_bytes()
  expected = {'config.json', 'model.safetensors', *COPIED}
  assert {p.name for p in out.iterdir()} == expected


def test_pruned_config_cuts_lists_with_an_entry_per_layer():
  config = {
    'num_hidden_layers': 4,
    'layer_types': ['a', 'b', 'c', 'd'],
    'no_rope_layers': [1, 0, 1, 0],
    'eos_token_id': [1, 2, 3, 4],
    'some_layers': [7],
    'torch_dtype': 'bfloat16',
    'hidden_size': 32,
  }
  before = json.loads(json.dumps(config))
  assert pruned_config(llama, config, [0, 3], 'float32') == {
    **before,
    'num_hidden_layers': 2,
    'layer_types': ['a', 'd'],
    'no_rope_layers': [1, 0],
    'torch_dtype': 'float32',
  }
  assert config == before
  del config['torch_dtype']
  got = pruned_config(llama, {**config, 'dtype': 'bfloat16'}, [1], 'float32')
  assert got['dtype'] == 'float32' and 'torch_dtype' not in got


# ---- older checkpoints ----


def test_old_rotary_buffers_are_accepted(mild, tmp_path):
  folder = shutil.copytree(mild, tmp_path / 'in')
  buffers = {f'model.layers.{l}.self_attn.rotary_emb.inv_freq': np.ones(4, np.float32) for l in range(6)}
  resave(folder, lambda tensors: tensors.update(buffers))
  save(folder, tmp_path / 'out')
  same_bytes(tensors_of(tmp_path / 'out'), tensors_of(mild))


def test_a_tied_checkpoint_may_store_its_head(tiny, tmp_path):
  folder = shutil.copytree(tiny, tmp_path / 'in')
  resave(folder, lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'].copy()}))
  assert 'lm_head.weight' in tensors_of(folder)
  model = save(folder, tmp_path / 'out')
  assert model.head is None
  same_bytes(tensors_of(tmp_path / 'out'), tensors_of(tiny))


LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}
ROPES = {
  'default': (None, {'rope_type': 'default'}),
  'linear': ({'type': 'linear', 'factor': 2.0}, {'rope_type': 'linear', 'factor': 2.0}),
  'llama3': ({'rope_type': 'llama3', **LLAMA3}, {'rope_type': 'llama3', **LLAMA3}),
}


@pytest.mark.parametrize('rope', ROPES)
def test_config_of_transformers_4_and_5(rope, tiny, tmp_path):
  scaling, parameters = ROPES[rope]
  config = json.loads((tiny / 'config.json').read_text())
  for key in ('rope_theta', 'rope_scaling', 'rope_parameters', 'torch_dtype', 'dtype'):
    config.pop(key, None)
  old = {**config, 'rope_theta': 5e5, 'rope_scaling': scaling, 'torch_dtype': 'float32'}
  new = {**config, 'rope_parameters': {**parameters, 'rope_theta': 5e5}, 'dtype': 'float32'}
  specs = []
  for name, config in (('old', old), ('new', new)):
    folder = shutil.copytree(tiny, tmp_path / name)
    (folder / 'config.json').write_text(json.dumps(config))
    source = open_folder(folder)
    specs.append((source.spec, source.num_layers))
    # config.json is written in the style in which it was read.
    after = pruned_config(llama, config, [0, 1, 2, 3, 4, 5], 'float32')
    assert without_additions(after, config) == config
  assert specs[0] == specs[1] and specs[0] != (open_folder(tiny).spec, 6)


# ---- verification of an export ----


@pytest.fixture
def exported(mild, tmp_path):
  """(folder, the pruned model that it holds)."""
  return tmp_path / 'out', save(mild, tmp_path / 'out', removed=[2, 3])


def test_verify_accepts_a_good_export(exported):
  folder, pruned = exported
  figures = verify.check(folder, pruned, 'float32', some_tokens(), torch=True)
  assert figures['jax'] == 0 and figures['torch'] <= 1e-5
  assert len(figures['generated']) == 32 and figures['generated'][:16] == some_tokens()[0, :16].tolist()
  assert verify.check(folder, pruned, 'float32', some_tokens(), torch=False) == {'jax': 0.0}


def test_verify_accepts_a_rounded_export(mild, tmp_path):
  source = open_folder(mild)
  model = load_model(source, 'float32')
  (tmp_path / 'out').mkdir()
  save_model(pieces_of_model(model), source, list(range(6)), tmp_path / 'out', 'bfloat16', BIG)
  figures = verify.check(tmp_path / 'out', model, 'bfloat16', some_tokens(), torch=True)
  assert figures['jax'] == 0 and figures['torch'] <= 1e-5


@pytest.mark.parametrize('name', ['model.layers.2.mlp.down_proj.weight', 'model.norm.weight', 'lm_head.weight'])
def test_verify_finds_a_changed_tensor(name, exported):
  folder, pruned = exported

  def change(tensors):
    tensors[name] = tensors[name] + np.float32(0.01)

  resave(folder, change)
  with pytest.raises(verify.ExportMismatch, match='differ'):
    verify.check(folder, pruned, 'float32', some_tokens(), torch=False)


def test_verify_finds_a_difference_that_only_torch_shows(exported):
  """Our reader is patched to miss another epsilon in config.json; this stands for any difference of this kind."""
  folder, pruned = exported
  good = open_folder(folder)
  config = json.loads((folder / 'config.json').read_text())
  config['rms_norm_eps'] = 0.5
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(verify, 'open_source', lambda *_: good)
    with pytest.raises(verify.ExportMismatch, match='PyTorch'):
      verify.check(folder, pruned, 'float32', some_tokens(), torch=True)


def test_a_mismatch_leaves_no_export(settings, monkeypatch):
  def refuse(folder, *args):
    assert (folder / 'model.safetensors').is_file() and folder.name != 'export'
    raise verify.ExportMismatch('differs')

  settings |= dict(num_remove=None, remove_layers='2,3', recipe='none', compare=(), train_data='')
  work = pathlib.Path(settings['workdir'])
  with monkeypatch.context() as patch:
    patch.setattr(verify, 'check', refuse)
    with pytest.raises(verify.ExportMismatch):
      pipeline.run(config_of(**settings))
  assert not (work / 'export').exists() and not (work / 'report.json').exists()
  pipeline.run(config_of(**settings))  # the same work folder resumes
  assert len(json.loads((work / 'report.json').read_text())['kept']) == 4
  assert (work / 'export' / 'model.safetensors').is_file() and not (work / 'export.partial').exists()
