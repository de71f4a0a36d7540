"""gpt-oss as published, with its experts' matrices in MXFP4."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
from tiny import config_of
from tiny import write_tokenizer
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from elder_jax.errors import InputError
from elder_jax.hf import mxfp4
from elder_jax.hf.source import open_source
from elder_jax.run import pipeline

pytestmark = pytest.mark.filterwarnings('ignore')

E, D, F = 4, 32, 64
PACKED = {'gate_up_proj': (E, 2 * F, D // 32), 'down_proj': (E, D, F // 32)}


def random_blocks(random, shape: tuple) -> tuple[np.ndarray, np.ndarray]:
  return random.integers(0, 256, (*shape, 16), np.uint8), random.integers(118, 125, shape, np.uint8)


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
  """(a packed folder, the same in bfloat16 as converted by transformers); read only."""
  packed, plain = (tmp_path_factory.mktemp(name) for name in ('packed', 'plain'))
  torch.manual_seed(0)
  sizes = dict(vocab_size=263, hidden_size=D, intermediate_size=F, num_hidden_layers=6, num_attention_heads=4)
  sizes |= dict(num_key_value_heads=2, head_dim=8, num_local_experts=E, num_experts_per_tok=2, sliding_window=8)
  model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, pad_token_id=None)).to(torch.bfloat16)
  model.save_pretrained(plain)
  random, tensors = np.random.default_rng(0), safetensors.torch.load_file(plain / 'model.safetensors')
  packed_tensors = {}
  for name in list(tensors):
    if (shape := PACKED.get(name.rpartition('.')[2])) is None:
      packed_tensors[name] = tensors[name]
      continue
    blocks, scales = map(torch.from_numpy, random_blocks(random, shape))
    packed_tensors |= {f'{name}_blocks': blocks, f'{name}_scales': scales}
    tensors[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
  config = json.loads((plain / 'config.json').read_text())
  how = {'quantization_config': {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}}
  for folder, kind, contents in ((packed, how, packed_tensors), (plain, {}, tensors)):
    (folder / 'config.json').write_text(json.dumps(config | kind))
    safetensors.torch.save_file(contents, folder / 'model.safetensors', {'format': 'pt'})
    write_tokenizer(folder)
  return packed, plain


def test_every_tensor_equals_the_conversion_of_transformers(folders):
  packed, plain = (open_source(str(folder), folder) for folder in folders)
  assert packed.shapes == plain.shapes and packed.dtypes == plain.dtypes and packed.config == plain.config
  for name in plain.shapes:
    expected = np.array(plain.read(name))
    np.testing.assert_array_equal(packed.read(name), expected)
    pieces = [piece.reshape(-1) for piece in packed.pieces(name)]
    np.testing.assert_array_equal(np.concatenate(pieces), expected.reshape(-1))


def test_all_four_bit_numbers_with_many_scales():
  blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
  blocks, scales = np.tile(blocks, (1, 200, 1)), np.tile(np.arange(20, 220, dtype=np.uint8), (16, 1))
  expected = convert_moe_packed_tensors(torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None])
  np.testing.assert_array_equal(mxfp4.dequantised(blocks, scales).astype(np.float32), expected[0].T.float().numpy())


def test_a_run_absorbs_trains_and_exports_in_bfloat16(folders, text, tmp_path):
  settings = dict(model=str(folders[0]), workdir=str(tmp_path / 'work'), train_data=str(text), num_remove=2)
  settings |= dict(seq_len=32, num_sequences=8, batch_size=4, recipe='absorb_then_train', train_steps=2, compare=())
  report = pipeline.run(config_of(**settings, verify='torch', prompts='none', method='shortgpt'))
  export = tmp_path / 'work' / 'export'
  config = json.loads((export / 'config.json').read_text())
  assert 'quantization_config' not in config and config['num_hidden_layers'] == 4
  tensors = safetensors.torch.load_file(export / 'model.safetensors')
  assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
  assert report['verify']['torch'] < 1e-4


def test_blocks_without_their_scales_are_refused(folders, tmp_path):
  for file in folders[0].iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  tensors = safetensors.torch.load_file(tmp_path / 'model.safetensors')
  del tensors['model.layers.1.mlp.experts.down_proj_scales']
  safetensors.torch.save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
  with pytest.raises(InputError, match=r'layers\.1\.mlp\.experts\.down_proj_blocks and .* do not match'):
    open_source(str(tmp_path), tmp_path)
