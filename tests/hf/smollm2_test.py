"""The real model of the demo, compared with PyTorch and exported. `make assets` fetches it."""

import json
import pathlib

import jax
import numpy as np
import pytest
from tiny import config_of

from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline
from elder_jax.text import data

ASSETS = pathlib.Path('~/.cache/elder_jax').expanduser()
GGUF = ASSETS / 'SmolLM2-135M-Instruct.Q4_1.gguf'
NEWS = ASSETS / 'lee_news.txt'

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('whole_compiler')]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """(report, export) of a run that keeps all layers."""
  return export(tmp_path_factory.mktemp('whole'), GGUF, '')


def export(work, model, remove_layers, **more):
  settings = dict(
    model=str(model),
    workdir=str(work),
    eval_data=(f'news={NEWS}',),
    eval_seq_len=256,
    eval_tokens=256,
    remove_layers=remove_layers,
    recipe='none',
    compare=[],
    verify='torch',
    export_dtype='float32',  # every bit of the dequantised weights
  )
  report = pipeline.run(config_of(**{**settings, **more}))
  return report, work / 'export'


def torch_model(folder):
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_equal_torch_on_512_tokens(whole):
  import torch

  _, folder = whole
  tokens = data.load_tokenizer(str(folder))(NEWS.read_text())['input_ids'][:512]
  tokens_BT = np.array([tokens], np.int32)
  source = open_source(str(folder), folder)
  model = load_model(source, 'float32')
  logits_BTV = jax.jit(lambda m, t: logits_of(m, forward(m, t)[0]))(model, tokens_BT)
  with torch.no_grad():
    expected_BTV = torch_model(folder)(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy()
  assert tokens_BT.shape == (1, 512) and expected_BTV.std() > 1
  # Logits reach 40, where float32 steps are 4e-6 and PyTorch's float32 differs from its float64 by up to 1e-4. JAX and
  # PyTorch differ by 0.8e-4 to 1.4e-4, depending on the processor; a wrong weight makes a difference of 1e-2.
  np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=2e-4)


def test_it_writes_english(whole):
  import torch

  _, folder = whole
  tokenizer = data.load_tokenizer(str(folder))
  prompt = torch.tensor([tokenizer('The capital of France is')['input_ids']])
  mask = torch.ones_like(prompt)
  tokens = torch_model(folder).generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
  assert 'Paris' in tokenizer.decode(tokens[0])


def test_pruning_the_exported_folder_equals_pruning_the_gguf_file(whole, tmp_path):
  """GGUF → folder → 23 layers equals GGUF → 23 layers; all other files stay byte for byte the same."""
  _, folder = whole
  removed = '12,13,14,15,16,17,18'
  direct, a = export(tmp_path / 'a', GGUF, removed)
  again, b = export(tmp_path / 'b', folder, removed, verify='jax')
  assert direct['ppl']['news'] == again['ppl']['news'] and direct['ppl']['news']['dense'] < 40
  assert direct['verify']['torch'] <= 2e-4
  names = {path.name for path in folder.iterdir()}
  assert {'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'model.safetensors'} <= names
  for name in names - {'README.md', 'SHA256SUMS', 'config.json', 'model.safetensors', 'elder_jax.json'}:
    assert (a / name).read_bytes() == (b / name).read_bytes() == (folder / name).read_bytes(), name
  assert (a / 'model.safetensors').read_bytes() == (b / 'model.safetensors').read_bytes()

  (once,), (none, then), (before,) = (json.loads((f / 'elder_jax.json').read_text())['lineage'] for f in (a, b, folder))
  assert none == before and not before['removed'] and once['removed'] == list(range(12, 19))
  assert then == once | {'model': folder.name} and once['model'] == before['model'] == GGUF.name

  config, before = (json.loads((f / 'config.json').read_text()) for f in (a, folder))
  assert config == before | {'num_hidden_layers': 23}
  model = torch_model(a)
  assert len(model.model.layers) == 23 and model.lm_head.weight is model.model.embed_tokens.weight
  tensors = open_source(str(a), a).shapes
  assert 'lm_head.weight' not in tensors and len(tensors) == 2 + 9 * 23
