"""Every family compared with transformers: logits, round trip byte for byte, removal, generation, refusals."""

import json
import pathlib

from family_cases import CASES
from family_cases import V
import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import config_of
from tiny import slow
from tiny import without_additions
from tiny import write_tokenizer
import torch
import transformers

from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import pieces_of_source
from elder_jax.hf.save import save_model
from elder_jax.hf.source import open_source
from elder_jax.model import pruning
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline
from elder_jax.text.generation import generate

T = 40


# One of each kind of block, for make test.
QUICK = ('llama, biases', 'gemma3_text, scaled', 'phi, grouped', 'opt, post-norm', 'gpt2', 'phi3, partial')


def write_model(path: pathlib.Path, case: str) -> pathlib.Path:
  """A random model of a family, saved by transformers."""
  kind = case.split(',')[0]
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **CASES[case]))
  with torch.no_grad():
    for name, p in model.named_parameters():
      if 'norm' in name or 'ln_' in name or p.ndim == 1:  # equal tensors could be swapped unnoticed
        low = -0.5 if kind.startswith(('gemma', 'qwen3_5')) or name.endswith('bias') else 0.5
        p.uniform_(low, low + 1)
  model.save_pretrained(path)
  write_tokenizer(path)
  return path


@pytest.fixture(scope='module', params=[c if c in QUICK else slow(c) for c in CASES])
def folder(request, tmp_path_factory) -> pathlib.Path:
  """Read only."""
  return write_model(tmp_path_factory.mktemp('model'), request.param)


def torch_logits(folder: pathlib.Path, tokens_BT) -> np.ndarray:
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  with torch.no_grad():
    return model(torch.tensor(tokens_BT)).logits.numpy()


@jax.jit
def logits(model, tokens_BT):
  return logits_of(model, forward(model, tokens_BT)[0])


def opened(folder: pathlib.Path):
  source = open_source(str(folder), folder)
  return source, load_model(source, 'float32')


def tokens(batch: int = 2, length: int = T) -> np.ndarray:
  return np.random.default_rng(0).integers(2, V, (batch, length), np.int32)


def close(got, expected):
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_logits_equal_those_of_transformers(folder):
  close(logits(opened(folder)[1], tokens()), torch_logits(folder, tokens().astype(np.int64)))


def tensors_of(folder: pathlib.Path) -> dict:
  return safetensors.numpy.load_file(folder / 'model.safetensors')


def test_the_round_trip_changes_no_byte(folder, tmp_path):
  source, model = opened(folder)
  save_model(pieces_of_model(model), source, list(range(source.num_layers)), tmp_path, 'float32', int(5e9))
  before, after = tensors_of(folder), tensors_of(tmp_path)
  assert before.keys() == after.keys()
  assert all(before[n].tobytes() == after[n].tobytes() and before[n].shape == after[n].shape for n in before)
  config = json.loads((folder / 'config.json').read_text())
  assert without_additions(json.loads((tmp_path / 'config.json').read_text()), config) == config


def test_removing_two_layers(folder, tmp_path):
  source, model = opened(folder)
  kept = [l for l in range(source.num_layers) if l not in (1, 2)]
  pruned = pruning.prune(model, [1, 2])
  save_model(pieces_of_model(pruned), source, kept, tmp_path, 'float32', int(5e9))
  expected = np.asarray(logits(pruned, tokens()))
  close(torch_logits(tmp_path, tokens().astype(np.int64)), expected)
  again, read = opened(tmp_path)
  assert read.spec == pruned.spec and again.num_layers == len(kept)
  np.testing.assert_array_equal(logits(read, tokens()), expected)
  # Skipping the layers computes the same as removing them.
  alive_L = np.isin(np.arange(source.num_layers), kept)
  skipped_BTD, _ = jax.jit(forward)(model, tokens(), alive_L)
  close(jax.jit(logits_of)(model, skipped_BTD), expected)


def test_generation_with_a_cache_equals_that_without(folder):
  _, model = opened(folder)
  prompts = [tokens()[0, :n].tolist() for n in (3, 11)]
  got = generate(model, prompts, 20)
  for prompt, new in zip(prompts, got):
    rows = np.zeros((1, T), np.int32)
    for token in new:
      rows[0, : len(prompt)] = prompt
      assert int(np.argmax(logits(model, rows)[0, len(prompt) - 1])) == token
      prompt = prompt + [token]
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  for prompt, new in zip(prompts, got):
    t = torch.tensor([prompt])
    how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert reference.generate(t, attention_mask=torch.ones_like(t), **how)[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize('damage', ['key', 'extra', 'missing'])
def test_an_unknown_key_or_tensor_is_named(folder, tmp_path, damage):
  config, weights = json.loads((folder / 'config.json').read_text()), tensors_of(folder)
  if damage == 'key':
    config['twisted_attention'], name = True, 'twisted_attention'
  elif damage == 'extra':
    name = next(n for n in weights if '.1.' in n) + '_scale'
    weights[name] = np.ones(3, np.float32)
  else:
    name = next(n for n in weights if '.1.' in n)
    del weights[name]
  (tmp_path / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(weights, tmp_path / 'model.safetensors')
  with pytest.raises(Exception, match=name.replace('.', r'\.')) as error:
    open_source(str(tmp_path), tmp_path)
  assert type(error.value).__name__ == 'InputError' and '\n' not in str(error.value)


@pytest.mark.parametrize(('case', 'prefix'), [('gpt2', 'transformer.'), ('opt', 'model.')])
def test_old_tensor_names_without_the_prefix(case, prefix, tmp_path):
  folder = write_model(tmp_path / 'in', case)
  before = tensors_of(folder)
  old = {name.removeprefix(prefix): tensor for name, tensor in before.items()}
  assert old.keys().isdisjoint(before)
  if case == 'gpt2':  # old files hold the causal mask
    old['h.0.attn.bias'] = np.ones((1, 1, 8, 8), np.float32)
  safetensors.numpy.save_file(old, folder / 'model.safetensors', metadata={'format': 'pt'})
  source, model = opened(folder)
  close(logits(model, tokens()), torch_logits(folder, tokens().astype(np.int64)))
  out = tmp_path / 'out'
  out.mkdir()
  save_model(pieces_of_source(source, [0, 2]), source, [0, 2], out, '', int(5e9))
  assert tensors_of(out).keys() <= before.keys()
  close(torch_logits(out, tokens().astype(np.int64)), logits(pruning.prune(model, [1, 3, 4]), tokens()))


@pytest.mark.parametrize('kind', [slow('gemma2'), 'gemma3_text'])
def test_a_run_with_the_default_recipe_on_blocks_with_a_norm_after_the_mlp(kind, settings, tmp_path, monkeypatch):
  monkeypatch.setitem(CASES, kind, CASES[kind] | {'vocab_size': 258})
  settings |= dict(model=str(write_model(tmp_path / 'in', kind)), recipe='absorb_then_train', num_remove=None)
  settings |= dict(remove_layers='2,3', compare=('none', 'absorb'), verify='torch')
  report = pipeline.run(config_of(**settings))
  removed, absorbed, trained = (row['ppl']['text'] for row in report['rows'])
  assert len({removed, absorbed, trained}) == 3 and report['verify']['torch'] <= 1e-4
  before, after = tensors_of(tmp_path / 'in'), tensors_of(tmp_path / 'work' / 'export')
  scale = 'model.layers.1.post_feedforward_layernorm.weight'
  assert (before[scale] != after[scale]).all() and before.keys() > after.keys()


FAMILIES_QUICK = ('granite', 'mixtral', 'qwen3_5_text')


@pytest.mark.parametrize('kind', [c if c in FAMILIES_QUICK else slow(c) for c in CASES if ',' not in c])
def test_a_run_that_absorbs_and_trains(kind, settings, tmp_path, monkeypatch):
  monkeypatch.setitem(CASES, kind, CASES[kind] | {'vocab_size': 258})
  settings |= dict(model=str(write_model(tmp_path / 'in', kind)), recipe='absorb_then_train', num_remove=None)
  settings |= dict(remove_layers='2,3', compare=('none', 'absorb'), verify='torch', train_steps=4)
  report = pipeline.run(config_of(**settings))
  removed, absorbed, trained = (row['ppl']['text'] for row in report['rows'])
  assert len({removed, absorbed, trained}) == 3 and report['verify']['torch'] <= 1e-4
