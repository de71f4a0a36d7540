"""`elder_jax export-gguf` writes a folder as a GGUF file, with the file that its model was made from."""

import pathlib
import shutil

import gguf
from gguf_cut_test import KINDS
from gguf_cut_test import logits
from gguf_cut_test import make
import numpy as np
import pytest
import safetensors.numpy
from tiny import config_of
from tiny import write_tiny_llama

from elder_jax.commands import export_gguf
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.hf import families
from elder_jax.hf.gguf import export
from elder_jax.hf.gguf import header
from elder_jax.run import series

pytestmark = pytest.mark.filterwarnings('ignore')
Type = gguf.GGMLQuantizationType


def cut_to_folder(path: pathlib.Path, work: pathlib.Path, removed, **more) -> pathlib.Path:
  settings = dict(model=str(path), workdir=str(work), remove_layers=removed, recipe='none', compare=(), verify='jax')
  series.run(config_of(**settings | more))
  return work / 'export'


def export_to(folder: pathlib.Path, out: pathlib.Path, like: pathlib.Path, **more) -> pathlib.Path:
  export_gguf.run(Parsed(dict(like=str(like), out=str(out)) | more, [str(folder)]))
  assert not list(out.parent.glob('*.partial'))
  return out


def tensors(path: pathlib.Path) -> dict[str, header.Tensor]:
  return {t.name: t for t in header.read(path)[1]}


def change(folder: pathlib.Path, name: str, value: float):
  path = folder / 'model.safetensors'
  weights = safetensors.numpy.load_file(path)
  weights[name] = weights[name] * np.float32(value)
  safetensors.numpy.save_file(weights, path, metadata={'format': 'pt'})


@pytest.mark.parametrize('kind', KINDS)
def test_the_file_holds_the_model_of_the_folder(kind, tmp_path, capsys):
  path = make(kind, tmp_path / 'model', quantize=Type.Q4_1)
  folder = cut_to_folder(path, tmp_path / 'work', [1, 4], export_dtype='float32')
  expected = logits(path, [1, 4])
  made = export_to(folder, tmp_path / 'f32.gguf', path, type='f32')
  np.testing.assert_array_equal(logits(made), expected)

  # The folder of a quantised file is in bfloat16. Unchanged tensors are recognised all the same.
  shorter = cut_to_folder(path, tmp_path / 'shorter', [1, 4])
  assert {str(t.dtype) for t in safetensors.numpy.load_file(shorter / 'model.safetensors').values()} == {'bfloat16'}
  made = export_to(shorter, tmp_path / 'same.gguf', path)
  np.testing.assert_array_equal(logits(made), expected)
  before, after = tensors(path), tensors(made)
  for name, tensor in after.items():
    if name.startswith('blk.'):
      _, l, rest = name.split('.', 2)
      name = f'blk.{[0, 2, 3, 5, 6, 7][int(l)]}.{rest}'
    assert tensor.data.tobytes() == before[name].data.tobytes() and tensor.tensor_type == before[name].tensor_type
  derived = sum(name == 'rope_freqs.weight' for name in after)
  assert f'{len(after) - derived} tensors copied from --like, byte for byte' in capsys.readouterr().out
  assert header.read_raw(made)[1].keys() - header.read_raw(path)[1].keys() <= {
    'gemma3.attention.sliding_window_pattern'
  }

  whole = tensors(tmp_path / 'f32.gguf')
  for choice in ('f16', 'bf16', 'q8_0'):
    made = export_to(folder, tmp_path / f'{choice}.gguf', path, type=choice)
    assert header.read(made)[0]['general.file_type'] == export.TYPES[choice][1]
    for name, tensor in tensors(made).items():
      if len(tensor.shape) == 1:
        assert tensor.tensor_type == Type.F32 and tensor.data.tobytes() == whole[name].data.tobytes()
        continue
      assert tensor.tensor_type in (export.TYPES[choice][0], Type.F16)  # F16: rows shorter than a block
      weight = whole[name].data
      error = np.abs(gguf.dequantize(tensor.data, tensor.tensor_type) - weight)
      blocks = np.abs(weight).reshape(-1, 32 if tensor.tensor_type == Type.Q8_0 else 1)
      scale = {Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 0.5 / 127 + 2**-11}[tensor.tensor_type]
      assert (error.reshape(blocks.shape) <= scale * blocks.max(1, keepdims=True) + 1e-7).all(), name


def test_a_changed_tensor_keeps_its_type(tmp_path, capsys, monkeypatch):
  path = make('qwen2', tmp_path / 'model', quantize=Type.Q4_1)
  folder = cut_to_folder(path, tmp_path / 'work', [1, 4], export_dtype='float32')
  change(folder, 'model.layers.1.mlp.up_proj.weight', 1.01)
  made = tensors(export_to(folder, tmp_path / 'a.gguf', path))
  printed = capsys.readouterr().out
  assert f'{len(made) - 1} tensors copied from --like' in printed and 'instead of' not in printed
  assert made['blk.1.ffn_up.weight'].tensor_type == Type.Q4_1
  new = gguf.dequantize(made['blk.1.ffn_up.weight'].data, Type.Q4_1)
  np.testing.assert_allclose(
    new, safetensors.numpy.load_file(folder / 'model.safetensors')['model.layers.1.mlp.up_proj.weight'], atol=0.03
  )
  monkeypatch.setattr(export, '_can_write', lambda kind: kind != Type.Q4_1)
  made = tensors(export_to(folder, tmp_path / 'b.gguf', path))
  assert made['blk.1.ffn_up.weight'].tensor_type == Type.Q8_0 and made['blk.0.ffn_up.weight'].tensor_type == Type.Q4_1
  assert 'wrote Q8_0 instead of Q4_1; use llama-quantize' in capsys.readouterr().out


def test_a_folder_without_known_layers_keeps_the_types(tmp_path, capsys):
  path = make('llama', tmp_path / 'model', quantize=Type.Q8_0)
  folder = cut_to_folder(path, tmp_path / 'work', [1, 4], export_dtype='float32')
  (folder / 'elder_jax.json').unlink()
  made = export_to(folder, tmp_path / 'a.gguf', path)
  assert '\n0 tensors copied from --like' in capsys.readouterr().out
  assert {t.tensor_type for t in tensors(made).values() if len(t.shape) == 2} == {Type.Q8_0}
  np.testing.assert_allclose(logits(made), logits(path, [1, 4]), atol=1e-2)


def test_from_and_to_gguf_are_inverses():
  random = np.random.default_rng(0)
  config = {'num_attention_heads': 4, 'num_key_value_heads': 2}
  for family in (f for f in families.FAMILIES.values() if hasattr(f, 'GGUF_NAMES')):
    for name in family.GGUF_NAMES:
      weight = random.normal(size=(16, 8)).astype(np.float32)
      again = family.from_gguf(name, family.to_gguf(name, weight, config), config)
      np.testing.assert_allclose(again, weight, atol=1e-6)


def test_refusals(tmp_path):
  path = make('llama', tmp_path / 'model')
  folder = cut_to_folder(path, tmp_path / 'work', [1, 4])
  out = tmp_path / 'out.gguf'

  def refused(sentence, folder=folder, out=out, like=path):
    with pytest.raises(InputError, match=sentence):
      export_to(folder, out, like)
    assert not (tmp_path / 'out.gguf').exists()

  refused('like=.*there is no such file', like=tmp_path / 'none.gguf')
  refused('out=.*is --like itself', out=path)
  refused('is a .gguf file already', folder=path)
  refused('like=.*has the architecture qwen2, the model has llama', like=make('qwen2', tmp_path / 'other'))
  wide = tmp_path / 'other_width'
  shutil.copytree(write_tiny_llama(tmp_path / 'wide', hidden_size=96), wide)
  refused('would read another model than the folder', folder=wide)
