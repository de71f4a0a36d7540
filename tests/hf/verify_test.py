"""The checks of source and export in PyTorch: they test weights, not sampling, and may fail without losing the export."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from refusal import one_sentence
from refusal import refused
import safetensors.numpy
from tiny import config_of
from tiny import slow

from elder_jax.errors import InputError
from elder_jax.hf import families
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.run import pipeline
from elder_jax.run import work as work_module


@pytest.fixture
def quick(settings) -> dict:
  """A short run that is checked in PyTorch."""
  settings |= dict(recipe='prune_then_train', method='last', compare=(), verify='torch')
  return settings


@pytest.mark.parametrize(
  'sampling',
  [
    {'stop_strings': ['\n\n']},
    {'do_sample': True, 'num_return_sequences': 2},
    slow({'prompt_lookup_num_tokens': 3}),
    slow({'cache_implementation': 'quantized'}),
    {'max_length': 3, 'min_length': 2, 'forced_eos_token_id': 1},
    slow({'num_beams': 4, 'penalty_alpha': 0.6, 'guidance_scale': 2.0}),
    {'begin_suppress_tokens': [1, 2], 'repetition_penalty': 1.7},
  ],
  ids=str,
)
def test_sampling_settings_of_the_source_do_not_matter(quick, model, sampling):
  path = model / 'generation_config.json'
  path.write_text(json.dumps({'bos_token_id': 0, 'eos_token_id': 1} | sampling))
  report = pipeline.run(config_of(**quick))
  assert report['verify']['torch'] <= 1e-4 and len(report['verify']['generated']) > 16
  assert 'torch_error' not in report['verify']
  assert (pathlib.Path(quick['workdir']) / 'export' / 'generation_config.json').read_bytes() == path.read_bytes()


def test_an_error_in_pytorch_keeps_the_export(quick, monkeypatch, capsys):
  monkeypatch.setattr(verify, '_figures_in_torch', lambda *args: (_ for _ in ()).throw(OSError('no such kernel')))
  report = pipeline.run(config_of(**quick))
  assert report['verify']['torch_error'] == 'no such kernel' and report['verify']['jax'] <= 1e-4
  assert 'could not be checked in PyTorch: no such kernel' in capsys.readouterr().err
  work = pathlib.Path(quick['workdir'])
  for page in (work / 'report.md', work / 'export' / 'README.md'):
    assert '**Not verified in PyTorch**: no such kernel.' in page.read_text()
  assert manifest.check(work / 'export')


def test_a_mismatch_leaves_no_export(quick, monkeypatch):
  monkeypatch.setattr(verify, '_torch_logits', lambda model, tokens_BT: 0.0)
  # The dense model is not checked.
  monkeypatch.setattr(verify, 'use_torch', lambda wish, params, say=None: params < 50_000)
  with pytest.raises(verify.ExportMismatch):
    pipeline.run(config_of(**quick))
  assert not (pathlib.Path(quick['workdir']) / 'export').exists()


def test_a_config_that_transformers_does_not_support_is_reported_early(
  quick, no_text, no_long_work, monkeypatch, capsys
):
  why = verify.why_torch_cannot
  monkeypatch.setattr(verify, 'why_torch_cannot', lambda config: why(config | {'model_type': 'not_yet'}))
  refused(quick, '--verify=torch', 'not_yet', '--verify=jax')
  with pytest.raises(pytest.fail.Exception):  # the run continues and reads the text
    pipeline.run(config_of(**quick | dict(verify='auto')))
  assert 'skipping the check in PyTorch' in capsys.readouterr().err


@pytest.mark.parametrize('recipe', ['prune_then_train', 'none'])
def test_a_misread_checkpoint_is_found_before_anything_else(quick, monkeypatch, recipe):
  if recipe == 'none':  # layers are copied, and the model is loaded for this check alone
    quick |= dict(train_data='', eval_data=(), num_remove=None, remove_layers='4', recipe='none')
  spec_from_config = families.FAMILIES['llama'].spec_from_config

  def misread(config):
    spec, num_layers = spec_from_config(config)
    return dataclasses.replace(spec, rope_freq_RH=((0.5,) * len(spec.rope_freq_RH[0]),)), num_layers

  monkeypatch.setattr(families.FAMILIES['llama'], 'spec_from_config', misread)
  monkeypatch.setattr(work_module, 'measure', lambda *args, **how: pytest.fail('it was measured first'))
  with pytest.raises(InputError) as caught:
    pipeline.run(config_of(**quick))
  one_sentence(
    caught.value.for_command(), f'--model={quick["model"]}', 'read this checkpoint differently', '--verify=jax'
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_good_checkpoint_passes(quick, dtype):
  pipeline.run(config_of(**quick | dict(dtype=dtype)))
  found = json.loads((pathlib.Path(quick['workdir']) / 'stages' / 'source.json').read_text())['result']
  assert found['torch'] < 1e-4


def test_a_weight_that_differs_in_the_file_is_found(quick, model, tmp_path):
  """Shows that the comparison can fail."""
  source = open_source(str(model), tmp_path)
  loaded = load_model(source, 'float32')
  path = model / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['model.layers.3.self_attn.q_proj.weight'][0] += 1
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  with pytest.raises(InputError, match='read this checkpoint differently'):
    verify.check_source(source, loaded, 'float32', np.array([[5, 6, 7, 8]]), torch=True)
