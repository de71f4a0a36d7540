"""Layers are cut from file to file by tensor names: the cut folder is the original without these modules."""

import json

import pytest
from strangers import cut
from strangers import deepseek_v3
from strangers import falcon_h1
from strangers import gemma3
from strangers import gpt_oss
from strangers import lfm2
from strangers import llama4
from strangers import load
from strangers import logits
from strangers import mixtral
from strangers import nemotron_h
from strangers import qwen2_5_vl
from strangers import qwen3_next
from strangers import save
from strangers import tensor_bytes
from strangers import without
from tiny import config_of
import torch

from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.hf import copies
from elder_jax.hf import manifest
from elder_jax.hf.by_name import folder as by_name
from elder_jax.hf.by_name import keys
from elder_jax.hf.by_name import layer_list
from elder_jax.hf.verify import ExportMismatch
from elder_jax.run import by_name as run_by_name
from elder_jax.run import series

pytestmark = pytest.mark.filterwarnings('ignore')

# Model -> (its list of layers, layers to remove, keys of config.json after the removal)
CASES = {
  mixtral: ('model.layers', [1, 3], {}),
  deepseek_v3: ('model.layers', [1, 4], {'first_k_dense_replace': 2}),
  qwen3_next: ('model.layers', [1, 6], {'decoder_sparse_step': 1, 'mlp_only_layers': [0, 1, 2, 3]}),
  llama4: ('model.layers', [1, 2], {'moe_layers': [1, 3, 5], 'no_rope_layers': [1, 0, 1, 1, 1, 0]}),
  gemma3: ('model.language_model.layers', [0, 4], {}),
  qwen2_5_vl: ('model.language_model.layers', [1, 5], {'max_window_layers': 2}),
  lfm2: ('model.layers', [1, 4], {'full_attn_idxs': [1]}),
  falcon_h1: ('model.layers', [2], {}),
  nemotron_h: ('model.layers', [2, 3], {}),
  gpt_oss: ('model.layers', [0, 3], {}),
}


@pytest.fixture
def no_decoder(monkeypatch):
  """Cuts multimodal models by tensor names too, although the decoder supports their language models."""
  monkeypatch.setattr(run_by_name, '_why_not_decoder', lambda model: 'forced by a test')


@pytest.mark.parametrize('make', CASES, ids=lambda make: make.__name__)
def test_the_cut_folder_computes_bit_for_bit_what_the_original_does_without_these_modules(make, tmp_path, no_decoder):
  at, removed, expected = CASES[make]
  source = save(make, tmp_path / 'source')
  export = cut(source, tmp_path / 'work', removed)
  got = logits(load(make, export))
  assert torch.equal(got, logits(without(load(make, source), at, removed))) and torch.isfinite(got).all()
  assert not torch.equal(got, logits(load(make, source)))
  config = json.loads((export / 'config.json').read_text())
  text_config = config.get('text_config', config)
  assert {key: text_config[key] for key in expected} == expected
  assert manifest.check(export) > 3


@pytest.mark.parametrize(
  'key', ['first_k_dense_replace', 'mlp_only_layers', 'no_rope_layers', 'max_window_layers', 'layer_types']
)
def test_a_key_without_its_rule_is_found_by_comparing_layers_in_transformers(key, tmp_path, monkeypatch, no_decoder):
  make, removed = {
    'first_k_dense_replace': (deepseek_v3, [1]),
    'mlp_only_layers': (qwen3_next, [0]),
    'no_rope_layers': (llama4, [1, 2]),
    'max_window_layers': (qwen2_5_vl, [1]),
    'layer_types': (gpt_oss, [0]),
  }[key]
  source = save(make, tmp_path / 'source')
  monkeypatch.setitem(keys.RULES, key, lambda key, value, cut: {key: value})
  if key == 'mlp_only_layers':
    monkeypatch.setitem(keys.RULES, 'decoder_sparse_step', lambda key, value, cut: {key: value})
  if key == 'layer_types':
    monkeypatch.setitem(keys.RULES, key, lambda key, value, cut: {key: value[: len(cut.kept)]})
  if key == 'max_window_layers':
    edit = json.loads((source / 'config.json').read_text())
    del edit['text_config']['layer_types']
    (source / 'config.json').write_text(json.dumps(edit))
    monkeypatch.setattr(keys, '_write_lists', lambda *_: None)
  if key == 'no_rope_layers':
    monkeypatch.setattr(keys, '_write_lists', lambda *_: None)
  with pytest.raises(InputError, match='would make layer .* another kind of layer'):
    cut(source, tmp_path / 'work', removed)


def test_layers_at_chooses_among_several_lists(tmp_path, no_decoder):
  source = save(gemma3, tmp_path / 'source')
  export = cut(source, tmp_path / 'work', [1], layers_at='vision_tower.encoder.layers')
  config = json.loads((export / 'config.json').read_text())
  assert config['vision_config']['num_hidden_layers'] == 2 and config['text_config']['num_hidden_layers'] == 7
  with pytest.raises(InputError, match=r'layers_at=nothing.*give one of .*language_model.model.layers \(7\)'):
    cut(source, tmp_path / 'other', [1], layers_at='nothing')
  settings = dict(model=str(source), workdir=str(tmp_path / 'third'), layers_at='x', remove_layers=[1], compare=())
  with pytest.raises(InputError, match='layers_at=x.*only applies when layers are cut'):
    series.run(config_of(**settings))
  with pytest.raises(InputError, match='export_dtype=bfloat16.*copies tensors unchanged'):
    cut(source, tmp_path / 'fourth', [1], export_dtype='bfloat16')
  with pytest.raises(InputError, match='text_only.*copies every tensor'):
    cut(source, tmp_path / 'fourth', [1], text_only=True)
  with pytest.raises(InputError, match='remove_layers.*has no layer 9'):
    cut(source, tmp_path / 'fifth', [9])


def test_a_killed_cut_is_repeated_and_a_finished_one_only_reported(tmp_path, monkeypatch, no_decoder):
  source = save(mixtral, tmp_path / 'source')
  size = copies.PIECE
  monkeypatch.setattr(copies, 'PIECE', 512)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, '_signalled', True)
    with pytest.raises(preemption.Preempted):
      cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work' / 'export').exists()
  export = cut(source, tmp_path / 'work', [2])
  written = tensor_bytes(export)
  monkeypatch.setattr(copies, 'PIECE', size)
  monkeypatch.setattr(by_name, 'open_checkpoint', None)
  assert tensor_bytes(cut(source, tmp_path / 'work', [2])) == written
  assert json.loads((tmp_path / 'work/report.json').read_text())['verify'] == {'tensors': len(written)}


def test_a_copy_that_differs_from_the_original_is_refused(tmp_path, monkeypatch, no_decoder):
  source = save(mixtral, tmp_path / 'source')
  write = by_name.write

  def damaged(checkpoint, kept, config, folder, *more):
    hashes = write(checkpoint, kept, config, folder, *more)
    path = next(folder.glob('*.safetensors'))
    path.write_bytes(path.read_bytes()[:-1] + b'\1')
    return hashes

  monkeypatch.setattr(by_name, 'write', damaged)
  with pytest.raises(ExportMismatch, match='differs from the original'):
    cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work' / 'export').exists()


def test_layers_that_predict_further_tokens_stay_last():
  layers = layer_list.find(
    [f'model.layers.{l}.w' for l in range(5)], dict(num_hidden_layers=4, num_nextn_predict_layers=1), 'x'
  )
  assert [layers.renamed(f'model.layers.{l}.w', [0, 3]) for l in range(5)] == [
    'model.layers.0.w',
    None,
    None,
    'model.layers.1.w',
    'model.layers.2.w',
  ]
  assert layers.renamed('lm_head.weight', [0]) == 'lm_head.weight'
