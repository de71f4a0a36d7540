"""Quantised models are cut from file to file, their tensors byte for byte."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
from strangers import SIZES
from strangers import cut
from strangers import gpt_oss
from strangers import logits
from strangers import save
from strangers import tensor_bytes
from strangers import without
import torch
import transformers

pytestmark = pytest.mark.filterwarnings('ignore')


def mxfp4(folder: pathlib.Path) -> pathlib.Path:
  """gpt-oss as published: the experts' matrices in blocks of 32 four-bit numbers (MXFP4)."""
  random, D, F, E = np.random.default_rng(0), 32, 64, 4
  save(lambda: gpt_oss(intermediate_size=F), folder)
  sizes = {'gate_up_proj': (2 * F, D // 32), 'down_proj': (D, F // 32)}
  return rewrite(folder, lambda name, tensor: packed(name, tensor, sizes, random, E), method='mxfp4')


def packed(name, tensor, sizes, random, E):
  part = name.rpartition('.')[2]
  if part not in sizes:
    return {name: tensor}
  rows, blocks = sizes[part]
  return {
    f'{name}_blocks': torch.from_numpy(random.integers(0, 256, (E, rows, blocks, 16), np.uint8)),
    f'{name}_scales': torch.from_numpy(random.integers(120, 127, (E, rows, blocks), np.uint8)),
  }


def fp8(folder: pathlib.Path) -> pathlib.Path:
  """A Qwen2 in fp8 with block scales, like the files of DeepSeek and Qwen."""

  def make():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**FP8))

  save(make, folder)

  def quantised(name, tensor):
    if not name.endswith('proj.weight') or '.layers.4.mlp' in name:
      return {name: tensor}
    scale = tensor.abs().max() / 448
    return {
      name: (tensor / scale).to(torch.float8_e4m3fn),
      f'{name}_scale_inv': scale.float().expand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)).contiguous(),
    }

  return rewrite(folder, quantised, method='fp8')


FP8 = {k: v for k, v in SIZES.items() if k != 'head_dim'} | dict(num_hidden_layers=5)


def rewrite(folder: pathlib.Path, change, method: str) -> pathlib.Path:
  """The folder with its tensors changed, in two shards, and a quantization_config."""
  tensors = {}
  for path in sorted(folder.glob('*.safetensors')):
    for name, tensor in safetensors.torch.load_file(path).items():
      tensors |= change(name, tensor)
    path.unlink()
  names = sorted(tensors)
  halves = [names[::2], names[1::2]]
  files = [f'model-0000{i + 1}-of-00002.safetensors' for i in range(2)]
  for file, half in zip(files, halves):
    safetensors.torch.save_file({name: tensors[name] for name in half}, folder / file, metadata={'format': 'pt'})
  weight_map = {name: file for file, half in zip(files, halves) for name in half}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  path = folder / 'config.json'
  unquantised = ['model.layers.4.mlp', 'model.layers.1.self_attn', 'lm_head', 'model.embed_tokens']
  if method == 'mxfp4':
    unquantised = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'lm_head']
  about = {'quant_method': method, 'modules_to_not_convert': unquantised}
  about |= {'weight_block_size': [128, 128], 'activation_scheme': 'dynamic'} if method == 'fp8' else {}
  path.write_text(json.dumps(json.loads(path.read_text()) | {'quantization_config': about}))
  return folder


@pytest.mark.parametrize('quantised', [mxfp4, fp8], ids=lambda f: f.__name__)
def test_quantised_weights_are_copied_byte_for_byte(quantised, tmp_path):
  source = quantised(tmp_path / 'source')
  export = cut(source, tmp_path / 'work', [1, 2])
  before, after = tensor_bytes(source), tensor_bytes(export)
  kept = [l for l in range(5 if quantised is fp8 else 6) if l not in (1, 2)]
  expected = {n: a for n, a in before.items() if not n.startswith('model.layers.')}
  for new, old in enumerate(kept):
    prefix = f'model.layers.{old}.'
    expected |= {n.replace(prefix, f'model.layers.{new}.'): a for n, a in before.items() if n.startswith(prefix)}
  assert after == expected and {'F8_E4M3', 'U8'} & {kind for kind, *_ in after.values()}
  assert sorted(p.name for p in export.glob('*.safetensors')) == sorted(p.name for p in source.glob('*.safetensors'))
  index = json.loads((export / 'model.safetensors.index.json').read_text())['weight_map']
  assert index.keys() == after.keys()
  if quantised is fp8:
    config = json.loads((export / 'config.json').read_text())['quantization_config']
    assert config['modules_to_not_convert'] == ['model.layers.2.mlp', 'lm_head', 'model.embed_tokens']
  classes = {fp8: transformers.Qwen2ForCausalLM, mxfp4: transformers.GptOssForCausalLM}
  models = [classes[quantised].from_pretrained(folder, dtype=torch.float32).eval() for folder in (export, source)]
  got, whole = logits(models[0]), logits(models[1])
  assert torch.equal(got, logits(without(models[1], 'model.layers', [1, 2]))) and not torch.equal(got, whole)
