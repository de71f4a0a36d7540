"""Damaged checkpoints are refused in one sentence that names the file or tensor, before weights are read."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from refusal import edit_json
from refusal import one_sentence
from refusal import refused
import safetensors.numpy
from tiny import config_of

from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.run import pipeline

Q_PROJ = 'model.layers.3.self_attn.q_proj.weight'
pytestmark = pytest.mark.usefixtures('no_long_work')


def edit_tensors(folder: pathlib.Path, edit):
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})


@pytest.fixture
def sharded(model) -> pathlib.Path:
  """The copy of the model in two files with an index."""
  tensors = safetensors.numpy.load_file(model / 'model.safetensors')
  (model / 'model.safetensors').unlink()
  home = {n: 'a.safetensors' if 'layers.0' in n else 'b.safetensors' for n in tensors}
  for file in ('a.safetensors', 'b.safetensors'):
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if home[n] == file}, model / file)
  (model / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': home}))
  return model


def test_the_undamaged_model_is_accepted(settings, model, sharded):
  job = pipeline.prepare(config_of(**settings))
  assert job.source.num_layers == 6 and job.num_removes == [2]
  assert (pathlib.Path(settings['workdir']) / 'config.json').is_file()


# ---- the model's folder ----


def test_missing_model_folder(settings, no_text, tmp_path):
  refused(settings, f'--model={tmp_path}/absent:', 'no such folder', model=f'{tmp_path}/absent')
  refused(settings, '--model=./absent:', 'no such folder', model='./absent')
  refused(settings, f'--model={tmp_path}/absent.gguf:', 'no such file', model=f'{tmp_path}/absent.gguf')
  long = str(tmp_path / ('x' * 300))  # longer than a file system allows
  refused(settings, f'--model={long}', 'no such folder', model=long)
  refused(settings, f'--model={long}.gguf', 'no such file', model=f'{long}.gguf')


def test_empty_or_foreign_model_folder(settings, no_text, tmp_path, text):
  (tmp_path / 'model').mkdir()
  refused(settings, f'--model={tmp_path}/model', 'is empty', model=str(tmp_path / 'model'))
  (tmp_path / 'model' / 'notes.txt').touch()
  refused(settings, f'--model={tmp_path}/model', 'no config.json', model=str(tmp_path / 'model'))
  refused(settings, f'--model={text}', 'not a .gguf', model=str(text))


def test_hub_id_that_cannot_be_fetched(settings, no_text, monkeypatch):
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  refused(settings, '--model=no-such-owner/no-such-model', 'hub', model='no-such-owner/no-such-model')


def test_folder_without_weights(settings, no_text, model):
  (model / 'model.safetensors').rename(model / 'weights.safetensors')
  refused(settings, model, 'no model.safetensors')


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'consolidated.00.pth', 'model.pt'])
def test_pickle_checkpoint(settings, no_text, model, name):
  (model / 'model.safetensors').unlink()
  (model / name).write_bytes(b'\x80\x04cos\nsystem\n')
  refused(settings, model / name, 'pickle', 'convert')


@pytest.mark.parametrize(
  'damage',
  [
    lambda b: b'',
    lambda b: b[:4],
    lambda b: b[:100],
    lambda b: b[:-1],
    lambda b: b[: len(b) // 2],
    lambda b: b + b'more',
    lambda b: b'\xff' * 8 + b[8:],
    lambda b: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n',
    lambda b: b'PK\x03\x04' + b[4:],
    lambda b: b.replace(b'"F32"', b'"F3Z"', 1),
  ],
  ids=['empty', 'tiny', 'header', 'last_byte', 'half', 'longer', 'length', 'lfs', 'zip', 'dtype'],
)
def test_truncated_or_foreign_safetensors(settings, no_text, model, damage):
  path = model / 'model.safetensors'
  path.write_bytes(damage(path.read_bytes()))
  refused(settings, path, 'truncated or not a safetensors file')


def test_index_that_names_a_missing_file(settings, no_text, sharded):
  (sharded / 'a.safetensors').unlink()
  refused(settings, sharded / 'model.safetensors.index.json', 'a.safetensors', 'not in the folder')


@pytest.mark.parametrize('file', ['../a.safetensors', '{folder}/../a.safetensors', 'sub/a.safetensors', '..', '..\\a'])
def test_index_that_points_outside_the_folder(settings, no_text, sharded, file):
  file = file.format(folder=sharded)
  (sharded / 'sub').mkdir()
  for place in (sharded.parent, sharded / 'sub'):  # the file exists, but must not be opened
    shutil.copy(sharded / 'a.safetensors', place)
  index = sharded / 'model.safetensors.index.json'
  where = json.loads(index.read_text())['weight_map']
  index.write_text(json.dumps({'weight_map': {n: file if f[0] == 'a' else f for n, f in where.items()}}))
  refused(settings, index, repr(file), 'outside the folder')


@pytest.mark.parametrize('weight_map', [None, {}, [], 'a.safetensors', {Q_PROJ: 1}])
def test_index_without_a_map(settings, no_text, sharded, weight_map):
  edit_json(sharded / 'model.safetensors.index.json', weight_map=weight_map)
  refused(settings, sharded / 'model.safetensors.index.json', 'weight_map')


@pytest.mark.parametrize('content', [b'{', b'[]', b'\xff\xfe', b''])
def test_unreadable_json(settings, no_text, sharded, content):
  for name in ('model.safetensors.index.json', 'config.json'):
    (sharded / name).write_bytes(content)
    refused(settings, sharded / name, 'JSON')


def test_index_that_disagrees_with_the_files(settings, no_text, sharded):
  index = sharded / 'model.safetensors.index.json'
  where = json.loads(index.read_text())['weight_map']
  edit_json(index, weight_map=where | {Q_PROJ: 'a.safetensors'})
  refused(settings, index, Q_PROJ, 'a.safetensors')
  edit_json(index, weight_map=where | {'model.ghost': 'b.safetensors'})
  refused(settings, index, 'model.ghost', 'b.safetensors')


def test_tensor_in_two_files(settings, no_text, sharded):
  tensors = safetensors.numpy.load_file(sharded / 'a.safetensors')
  other = safetensors.numpy.load_file(sharded / 'b.safetensors')[Q_PROJ]
  safetensors.numpy.save_file(tensors | {Q_PROJ: other + 1}, sharded / 'a.safetensors')
  refused(settings, sharded / 'b.safetensors', Q_PROJ, 'also in a.safetensors', 'other values')
  safetensors.numpy.save_file(tensors | {Q_PROJ: other}, sharded / 'a.safetensors')  # identical duplicates are harmless
  assert open_source(str(sharded), sharded / 'scratch').num_layers == 6


# ---- tensors ----


def test_missing_tensor(settings, no_text, model):
  edit_tensors(model, lambda tensors: tensors.pop(Q_PROJ))
  refused(settings, f'--model={model}', Q_PROJ, 'is missing')


@pytest.mark.parametrize(
  'name', ['model.layers.3.self_attn.q_proj.bias', 'model.layers.6.self_attn.q_proj.weight', 'vision.weight', '']
)
def test_unexpected_tensor(settings, no_text, model, name):
  edit_tensors(model, lambda tensors: tensors.update({name: np.zeros(32, np.float32)}))
  refused(settings, f'--model={model}', f'the tensor {name} has no place')


@pytest.mark.parametrize('shape', [(32, 31), (32,), (1024,), (32, 32, 1), ()])
def test_tensor_of_the_wrong_shape(settings, no_text, model, shape):
  edit_tensors(model, lambda tensors: tensors.update({Q_PROJ: np.zeros(shape, np.float32)}))
  refused(settings, f'--model={model}', Q_PROJ, f'has shape {list(shape)}', '[32, 32]')


def test_untied_model_without_a_head(settings, no_text, model):
  edit_json(model / 'config.json', tie_word_embeddings=False)
  refused(settings, 'lm_head.weight', 'is missing')


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'float64', 'float8_e4m3fn'])
def test_tensor_of_an_unsupported_type(settings, no_text, model, dtype):
  edit_tensors(model, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(jnp.dtype(dtype))}))
  refused(settings, f'--model={model}', Q_PROJ, 'convert' if dtype == 'float64' else 'unquantised')


@pytest.mark.parametrize('head', ['LlamaForSequenceClassification', 'LlamaForTokenClassification'])
def test_classifier(settings, no_text, model, head):
  edit_json(model / 'config.json', architectures=[head])
  refused(settings, f'--model={model}', head, 'ForCausalLM')


def test_lora_adapter(settings, no_text, model):
  (model / 'adapter_config.json').write_text('{}')
  (model / 'model.safetensors').rename(model / 'adapter_model.safetensors')
  refused(settings, f'--model={model}', 'is a LoRA adapter', 'merge')
  (model / 'config.json').unlink()
  refused(settings, f'--model={model}', 'is a LoRA adapter', 'merge')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_tensor_that_is_not_finite(settings, model, tmp_path, value):
  def poison(tensors):
    tensors[Q_PROJ][3, 5] = value

  edit_tensors(model, poison)
  source = open_source(str(model), tmp_path / 'scratch')
  with pytest.raises(InputError) as caught:
    load_model(source, 'float32')
  one_sentence(caught.value.for_command(), f'--model={model}', Q_PROJ, 'NaN or infinite')
