"""Layers are removed without loading the model; SHA256SUMS and the command that checks it."""

import hashlib
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import safetensors.numpy
from tiny import config_of
from tiny import without_additions
from tiny import write_tiny_llama

from elder_jax.commands import run_verb
from elder_jax.devices import memory
from elder_jax.errors import InputError
from elder_jax.hf import safetensors_files
from elder_jax.hf import verify
from elder_jax.hf.source import open_source
from elder_jax.run import job as job_module
from elder_jax.run import pipeline


@pytest.fixture
def copying(tmp_path) -> dict:
  folder = write_tiny_llama(tmp_path / 'in', 'bfloat16', '20KB')
  return dict(
    model=str(folder), workdir=str(tmp_path / 'work'), recipe='none', compare=(), remove_layers='1,4', verify='torch'
  )


def tensors_of(folder) -> dict[str, np.ndarray]:
  tensors = {}
  for path in pathlib.Path(folder).glob('*.safetensors'):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


def renumbered(tensors: dict, kept: list[int]) -> dict:
  result = {}
  for name, tensor in tensors.items():
    parts = name.split('.')
    if parts[1] == 'layers':
      if int(parts[2]) not in kept:
        continue
      parts[2] = str(kept.index(int(parts[2])))
    result['.'.join(parts)] = tensor
  return result


def same(a: dict, b: dict):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def test_a_copy_has_the_kept_layers_byte_for_byte(copying, monkeypatch):
  # Otherwise PyTorch loads the dense model for the check of the source.
  monkeypatch.setattr(verify, 'use_torch', lambda wish, params, say=None: params < 50_000)
  monkeypatch.setattr(job_module, 'load_model', lambda *args: pytest.fail('the model was loaded'))
  monkeypatch.setattr(safetensors_files, 'PIECE', 1000)  # so that tensors are read in many pieces
  report = pipeline.run(config_of(**copying, shard_gb=3e-5))
  export = pathlib.Path(copying['workdir']) / 'export'
  assert report['kept'] == [0, 2, 3, 5] and len(list(export.glob('*.safetensors'))) > 1
  expected = renumbered(tensors_of(copying['model']), [0, 2, 3, 5])
  same(tensors_of(export), expected)
  assert report['verify']['tensors'] == len(expected) and len(report['verify']['generated']) == 32
  before, after = (json.loads((pathlib.Path(f) / 'config.json').read_text()) for f in (copying['model'], export))
  assert without_additions(after, before) == before | {'num_hidden_layers': 4}
  assert report['params']['dense'] == sum(t.size for t in tensors_of(copying['model']).values())
  assert report['params']['pruned'] == sum(t.size for t in expected.values())


def test_a_copy_equals_the_export_of_a_loaded_model(copying, text, tmp_path):
  pipeline.run(config_of(**copying))
  measured = dict(eval_data=(f'text={text}',), eval_seq_len=32, eval_tokens=64, workdir=str(tmp_path / 'measured'))
  pipeline.run(config_of(**copying | measured))
  same(*(tensors_of(f'{work}/export') for work in (copying['workdir'], measured['workdir'])))


def test_removing_no_layer_is_a_round_trip(copying):
  pipeline.run(config_of(**copying | dict(remove_layers='')))
  same(tensors_of(f'{copying["workdir"]}/export'), tensors_of(copying['model']))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_copy_in_another_type(dtype, copying):
  pipeline.run(config_of(**copying, export_dtype=dtype))
  expected = renumbered(tensors_of(copying['model']), [0, 2, 3, 5])
  same(tensors_of(f'{copying["workdir"]}/export'), {n: t.astype(dtype) for n, t in expected.items()})
  assert json.loads(pathlib.Path(copying['workdir'], 'export', 'config.json').read_text())['dtype'] == dtype


def test_tensors_of_several_types_keep_their_types(copying, tmp_path):
  folder = write_tiny_llama(tmp_path / 'mixed', 'bfloat16')
  tensors = {n: t.astype('float32') if 'norm' in n else t for n, t in tensors_of(folder).items()}
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  pipeline.run(config_of(**copying | dict(model=str(folder))))
  same(tensors_of(f'{copying["workdir"]}/export'), renumbered(tensors, [0, 2, 3, 5]))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', 'float16'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named(value, dtype, copying, tmp_path):
  folder, name = write_tiny_llama(tmp_path / 'bad', dtype), 'model.layers.2.mlp.up_proj.weight'
  tensors = tensors_of(folder)
  tensors[name] = tensors[name].copy()
  tensors[name][3, 5] = value
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(InputError, match=name.replace('.', r'\.')):
    pipeline.run(config_of(**copying | dict(model=str(folder))))
  assert not pathlib.Path(copying['workdir'], 'export').exists()


def test_a_file_that_shrinks_while_it_is_read(copying):
  source = open_source(copying['model'], pathlib.Path(copying['workdir']))
  path = next(pathlib.Path(copying['model']).glob('*.safetensors'))
  name = next(iter(safetensors.numpy.load_file(path)))
  os.truncate(path, 500)
  for read in (source.read, lambda name: list(source.pieces(name))):
    with pytest.raises(InputError, match='shorter|truncated'):
      read(name)


# ---- SHA256SUMS ----


@pytest.fixture
def export(copying) -> pathlib.Path:
  pipeline.run(config_of(**copying, shard_gb=3e-5))
  return pathlib.Path(copying['workdir']) / 'export'


def test_every_file_but_the_card_is_listed_with_its_hash(export):
  lines = dict(line.split('  ')[::-1] for line in (export / 'SHA256SUMS').read_text().splitlines())
  files = {p.name: p for p in export.iterdir() if p.name not in ('SHA256SUMS', 'README.md')}
  assert lines == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
  assert subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=export, check=False).returncode == 0


def test_the_command_accepts_an_unchanged_export(export, capsys):
  run_verb('verify', [str(export)])
  assert 'files as written, llama, 4 layers' in capsys.readouterr().out


def _flip(path: pathlib.Path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('damage', 'parts'),
  [
    (lambda f: _flip(sorted(f.glob('*.safetensors'))[1]), ['model-00002-of-', 'not what was written']),
    (lambda f: _flip(f / 'tokenizer.json'), ['tokenizer.json', 'not what was written']),
    (lambda f: (f / 'config.json').unlink(), ['config.json', 'missing']),
    (lambda f: (f / 'SHA256SUMS').unlink(), ['SHA256SUMS', 'exported by elder_jax']),
    (lambda f: (f / 'SHA256SUMS').write_bytes(b'\xff\xfe'), ['SHA256SUMS', 'exported by elder_jax']),
    (lambda f: (f / 'SHA256SUMS').write_text(f'{"0" * 64}  ../secret\n'), ['SHA256SUMS', 'no hash and file name']),
    (lambda f: (f / 'SHA256SUMS').write_text(''), ['SHA256SUMS', 'is empty']),
  ],
)
def test_the_command_names_the_damaged_file(damage, parts, export, capsys):
  damage(export)
  with pytest.raises(SystemExit) as end:
    run_verb('verify', [str(export)])
  message = capsys.readouterr().err.strip()
  assert end.value.code == 1 and '\n' not in message and all(part in message for part in parts)


def test_pytorch_is_left_out_if_the_model_would_fill_the_memory(monkeypatch, capsys):
  monkeypatch.setattr(memory, 'total', lambda: 4096 * 10**6)
  assert verify.use_torch('auto', 10**8) and not verify.use_torch('auto', 10**9) and verify.use_torch('torch', 10**9)
  assert 'left out' in capsys.readouterr().err and not verify.use_torch('jax', 1)
