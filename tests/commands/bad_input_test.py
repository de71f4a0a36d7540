"""Bad settings, work folders and checkpoints: one sentence that names flag, file or tensor, before any long work."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import edit_json
from refusal import one_sentence
from refusal import refused
import safetensors.numpy
from tiny import config_of

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf import verify
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
  """The copy in two files with an index."""
  tensors = safetensors.numpy.load_file(model / 'model.safetensors')
  (model / 'model.safetensors').unlink()
  home = {n: 'a.safetensors' if 'layers.0' in n else 'b.safetensors' for n in tensors}
  for file in ('a.safetensors', 'b.safetensors'):
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if home[n] == file}, model / file)
  (model / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': home}))
  return model


def test_what_the_cases_below_damage_is_good(settings, model, sharded):
  job = pipeline.prepare(config_of(**settings))
  assert job.source.num_layers == 6 and job.num_removes == [2]
  assert (pathlib.Path(settings['workdir']) / 'config.json').is_file()


# ---- settings ----


@pytest.mark.parametrize(
  ('more', 'parts'),
  [
    (dict(model=''), ['--model']),
    (dict(workdir=''), ['--workdir']),
    (dict(train_data=''), ['--train_data']),
    (dict(lambda1=-0.1), ['--lambda1=-0.1']),
    (dict(lambda2=-1e-3), ['--lambda2=-0.001']),
    (dict(lambda2=float('nan')), ['--lambda2=nan']),
    (dict(lambda2_power=-1.0), ['--lambda2_power']),
    (dict(gate_lr=-1.0), ['--gate_lr']),
    (dict(lr=float('inf')), ['--lr=inf']),
    (dict(weight_decay=-1.0), ['--weight_decay']),
    (dict(grad_clip=0.0), ['--grad_clip']),
    (dict(shard_gb=0.0), ['--shard_gb']),
    (dict(protect_first=-1), ['--protect_first']),
    (dict(protect_last=-1), ['--protect_last']),
    (dict(num_remove=-1), ['--num_remove=-1']),
    (dict(train_steps=-1), ['--train_steps']),
    (dict(eval_tokens=-1), ['--eval_tokens']),
    (dict(seed=-1), ['--seed']),
    (dict(checkpoint_every=-1), ['--checkpoint_every']),
    (dict(num_remove=None, ratio='1.0'), ['--ratio']),
    (dict(warmup_ratio=-0.1), ['--warmup_ratio']),
    (dict(num_remove=None, ratio='0.1,x'), ['--ratio=0.1,x', 'numbers, with commas']),
    (dict(num_remove=None, ratio='0.1,nan'), ['--ratio=0.1,nan', 'below 1']),
    (dict(method='elder,slep'), ['--method=slep', 'is not known', 'sleb']),
    (dict(method='laco', num_remove=5), ['--method=laco', 'not 5']),
    (dict(method='taylor', num_remove=1), ['--method=taylor', '0 of the 6', '1 are to be removed']),
    (dict(method='shortgpt', num_remove=6), ['6 layers', 'of 6', 'leave one']),
    (dict(order='sequential', train_steps=1), ['--order=sequential', '1 steps', '2 layers', '--order=joint']),
    (dict(lora_rank=-1), ['--lora_rank=-1']),
    (dict(lora_rank=17), ['--lora_rank=17', 'smallest side', 'is 16', 'at most']),
    (dict(lora_rank=4, trainable='all'), ['--lora_rank=4', '--trainable=blocks']),
    (dict(lora_rank=4, lora_alpha=0.0), ['--lora_alpha=0.0', 'above 0']),
    (dict(lora_alpha=8.0), ['--lora_alpha=8.0', '--lora_rank']),
    (dict(optimizer='adafactor', moment_dtype='bfloat16'), ['--moment_dtype=bfloat16', '--optimizer=adafactor']),
    (dict(anneal=1.5), ['--anneal=1.5']),
    (dict(distill=-0.5), ['--distill=-0.5']),
    (dict(distill='0.9:1.5'), ['--distill=0.9,1.5', 'at most 1']),
    (dict(distill='0.9:0.5:0.1'), ['--distill=0.9,0.5,0.1', 'one weight, or two']),
    (dict(distill=''), ['--distill=', 'one weight, or two']),
    (dict(distill='half'), ['--distill=half', 'numbers']),
    (dict(num_remove=None, ratio='0.1:0.2'), ['--ratio=0.1:0.2', 'numbers, with commas']),
    (dict(temperature=0.0), ['--temperature=0.0', 'above 0']),
    (dict(distill_hidden=-1.0), ['--distill_hidden=-1.0']),
    (dict(lr_schedule='step'), ['--lr_schedule=step', 'cosine']),
    (dict(lr_final=1.5), ['--lr_final=1.5', 'at most 1']),
    (dict(decay_ratio=1.5), ['--decay_ratio=1.5', 'at most 1']),
    (dict(score_steps=0), ['--score_steps=0']),
    (dict(seq_len=1), ['--seq_len=1', 'at least 2']),
    (dict(num_sequences=0), ['--num_sequences=0']),
    (dict(batch_size=0), ['--batch_size=0']),
    (dict(grad_accum=0), ['--grad_accum=0']),
    (dict(eval_seq_len=1), ['--eval_seq_len=1']),
    (dict(eval_batch_size=0), ['--eval_batch_size=0']),
    (dict(gate_steps=0), ['--gate_steps=0']),
    (dict(batch_size=3), ['--batch_size=3', '--num_sequences=8']),
    (dict(grad_accum=3), ['--grad_accum=3', '--batch_size=4']),
    (dict(compare=['none', 'nothing']), ['--compare=nothing', 'is not known']),
    (dict(num_remove=5), ['5 layers', 'of 6', '--protect_first=1', '--protect_last=1', '4 to choose']),
    (dict(num_remove=None, ratio='0.9'), ['5 layers', '--protect_first=1']),
    (dict(num_remove=1, protect_first=9), ['1 layers', '--protect_first=9', '0 to choose']),
    (dict(num_remove=None, remove_layers='2,6'), ['--remove_layers', '6', '0 to 5']),
    (dict(num_remove=None, remove_layers='-1'), ['--remove_layers', '-1', '0 to 5']),
    (dict(num_remove=None, remove_layers='2,3,2'), ['--remove_layers=2,3,2', 'twice']),
    (dict(num_remove=None, remove_layers='two'), ['--remove_layers=two', 'numbers']),
    (dict(num_remove=None, remove_layers='1;2'), ['--remove_layers=1;2', 'numbers']),
    (dict(num_remove=None, remove_layers='0,1,2,3,4,5'), ['--remove_layers', 'every layer']),
    (dict(eval_data=('text.txt',)), ['--eval_data=text.txt', 'name=source']),
    (dict(eval_data=('=text.txt',)), ['--eval_data==text.txt', 'name=source']),
    (dict(eval_data=('news=',)), ['--eval_data=news=', 'name=source']),
    (dict(eval_data=('a/b=text.txt',)), ['--eval_data=a/b=text.txt', 'name=source']),
    (dict(mesh='1,1'), ['--mesh=1,1:', 'data,fsdp,tp']),
    (dict(mesh=(1, 1)), ['--mesh=1,1:', 'data,fsdp,tp']),
    (dict(mesh='-1,-1,1'), ['--mesh=-1,-1,1:', 'data,fsdp,tp']),
    (dict(mesh='0,1,1'), ['--mesh=0,1,1:', 'data,fsdp,tp']),
    (dict(mesh='1,7,1'), ['--mesh=1,7,1:', '7 devices']),
    (dict(mesh='-1,7,1'), ['--mesh=-1,7,1:', '7 devices']),
    (dict(mesh=f'-1,{2**32},{2**32}'), ['--mesh', str(2**64)]),
  ],
  ids=str,
)
def test_settings(settings, no_text, more, parts):
  refused(settings, *parts, **more)


def test_torch_verification_without_torch(settings, no_text, monkeypatch):
  monkeypatch.setattr(verify, 'has_torch', lambda: False)
  refused(settings, '--verify=torch', 'torch is not installed', verify='torch')


@pytest.mark.parametrize(
  ('sizes', 'more', 'parts'),
  [
    ((4, 1, 1), dict(grad_accum=2), ['data × fsdp = 4', '--batch_size / --grad_accum=2']),
    ((2, 2, 1), dict(eval_batch_size=6), ['data × fsdp = 4', '--eval_batch_size=6']),
    ((1, 3, 1), {}, ['fsdp=3', '32']),
    ((1, 1, 5), {}, ['tp=5', '263']),
  ],
  ids=str,
)
def test_mesh_that_does_not_divide(settings, no_text, monkeypatch, sizes, more, parts):
  mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)  # needs no devices
  monkeypatch.setattr(sharding, 'make_mesh', lambda flag: mesh)
  refused(settings, '--mesh=', *parts, mesh=','.join(map(str, sizes)), **more)


# ---- the work folder ----


def test_workdir_that_is_a_file(settings, no_text, tmp_path):
  (tmp_path / 'file').touch()
  refused(settings, f'--workdir={tmp_path}/file', 'cannot be written', workdir=str(tmp_path / 'file'))
  refused(settings, f'--workdir={tmp_path}/file/in', 'cannot be written', workdir=str(tmp_path / 'file' / 'in'))


def test_workdir_that_cannot_be_written(settings, no_text, tmp_path, monkeypatch):
  def touch(self, *args, **kwargs):  # root may write everywhere, so the refusal is made up
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'touch', touch)
  refused(settings, f'--workdir={settings["workdir"]}', 'Permission denied')


def test_workdir_of_something_else(settings, no_text):
  work = pathlib.Path(settings['workdir'])
  work.mkdir()
  (work / 'thesis.tex').touch()
  refused(settings, f'--workdir={work}', 'thesis.tex')
  assert [p.name for p in work.iterdir()] == ['thesis.tex']


def test_workdir_that_is_the_model(settings, no_text, model):
  files = sorted(p.name for p in model.iterdir())
  refused(settings, f'--workdir={model}', 'not of an earlier run', workdir=str(model))
  assert sorted(p.name for p in model.iterdir()) == files


def test_workdir_of_a_run_with_other_settings(settings):
  pipeline.prepare(config_of(**settings))
  refused(settings, f'--workdir={settings["workdir"]}', '--lambda1=0.005', '0.1', lambda1=0.1)
  refused(settings, '--eval_data', eval_data=())
  pipeline.prepare(config_of(**settings, checkpoint_every=7))  # does not change the result


def test_workdir_with_a_broken_record(settings, no_text):
  work = pathlib.Path(settings['workdir'])
  work.mkdir()
  (work / 'config.json').write_text('{"model": ')
  refused(settings, f'--workdir={work}', 'not of an earlier run', 'config.json')


def test_a_home_that_does_not_exist(settings, tmp_path, no_text, monkeypatch):
  monkeypatch.chdir(tmp_path)
  refused(settings, '--model=~no_such_user/x', model='~no_such_user/x')
  refused(settings, '--model=~no_such_user/x.gguf', model='~no_such_user/x.gguf')
  refused(settings, '--model', model='', workdir='~no_such_user/work')


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
def test_index_that_leads_outside(settings, no_text, sharded, file):
  file = file.format(folder=sharded)
  (sharded / 'sub').mkdir()
  for place in (sharded.parent, sharded / 'sub'):  # it is there, and is not to be opened
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
  safetensors.numpy.save_file(tensors | {Q_PROJ: other}, sharded / 'a.safetensors')  # the same twice is no harm
  assert open_source(str(sharded), sharded / 'scratch').num_layers == 6


# ---- tensors ----


def test_missing_tensor(settings, no_text, model):
  edit_tensors(model, lambda tensors: tensors.pop(Q_PROJ))
  refused(settings, f'--model={model}', Q_PROJ, 'is missing')


@pytest.mark.parametrize(
  'name', ['model.layers.3.self_attn.q_proj.bias', 'model.layers.6.self_attn.q_proj.weight', 'vision.weight', '']
)
def test_tensor_left_over(settings, no_text, model, name):
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
def test_tensor_of_a_type_that_is_not_read(settings, no_text, model, dtype):
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


# ---- config.json ----


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (dict(model_type='bert'), ["'bert'", 'llama']),
    (dict(model_type=None), ['model_type', 'None']),
    (dict(model_type=['llama']), ['model_type', "['llama']"]),
    (dict(num_experts=8), ["'num_experts'"]),
    (dict(num_experts=8, qk_clip=[1] * 999), ["the keys 'num_experts', 'qk_clip' are not known", 'model_type llama']),
    ({f'k{i}' * 30: i for i in range(13)}, ["the keys 'k0k0k0", "'k9k9", '… and 3 more are not known']),
    (dict(hidden_act='quick_gelu'), ["hidden_act='quick_gelu'", "'gelu_new'"]),
    (dict(hidden_act=['silu'] * 999), ["hidden_act=['silu', "]),
    (dict(attention_bias=True), ['model.layers.0.self_attn.q_proj.bias']),
    (dict(mlp_bias=True), ['model.layers.0.mlp.gate_proj.bias']),
    (dict(pruned_heads={'0': [1]}), ["pruned_heads={'0': [1]}", 'only {} is']),
    (dict(add_cross_attention=True), ['add_cross_attention=True']),
    (dict(layer_types=['full_attention'] * 5 + ['sliding_attention']), ['layer_types', "'full_attention'"]),
    (dict(sliding_window=128), ['sliding_window=128']),
    (dict(quantization_config={'bits': 4}), ['quantization_config, the checkpoint is quantised; use']),
    (
      dict(quantization_config={'quant_method': 'gptq', 'ignore': ['lm_head'] * 999}),
      ["by its quantization_config, the checkpoint is quantised with quant_method 'gptq'; use the unquantised one."],
    ),
    (dict(quantization={'bits': 4, 'group_size': 64}), ['by its quantization, the checkpoint is quantised']),
    (dict(hidden_size='32'), ["hidden_size='32'"]),
    (dict(hidden_size=None), ['hidden_size=None']),
    (dict(hidden_size=32.0), ['hidden_size=32.0']),
    (dict(hidden_size=True), ['hidden_size=True']),
    (dict(hidden_size=[32]), ['hidden_size=[32]']),
    (dict(vocab_size=-1), ['vocab_size=-1']),
    (dict(vocab_size=262), ['model.embed_tokens.weight', '[262, 32]']),
    (dict(intermediate_size=0), ['intermediate_size=0']),
    (dict(num_attention_heads=0), ['num_attention_heads=0']),
    (dict(num_key_value_heads=0), ['num_key_value_heads=0']),
    (dict(num_key_value_heads=3), ['num_attention_heads=4', 'num_key_value_heads=3']),
    (dict(head_dim=7), ['head_dim=7']),
    (dict(head_dim=2**20), [f'head_dim={2**20}']),
    (dict(num_hidden_layers=0), ['num_hidden_layers=0']),
    (dict(num_hidden_layers='6'), ["num_hidden_layers='6'"]),
    (dict(num_hidden_layers=7), ['model.layers.6.', 'is missing']),
    (dict(num_hidden_layers=5), ['model.layers.5.', 'has no place']),
    (dict(num_hidden_layers=10**9), ['num_hidden_layers=1000000000']),
    (dict(rms_norm_eps='1e-5'), ["rms_norm_eps='1e-5'"]),
    (dict(rms_norm_eps=0), ['rms_norm_eps=0']),
    (dict(rms_norm_eps=float('nan')), ['rms_norm_eps=nan']),
    (dict(rms_norm_eps=10**400), ['rms_norm_eps=1000']),
    (dict(tie_word_embeddings='false'), ["tie_word_embeddings='false'"]),
    (dict(rope_parameters={'rope_type': 'yarn', 'factor': 2.0}), ["rope type 'yarn'"]),
    (dict(rope_parameters=None, rope_scaling={'type': 'dynamic', 'factor': 2.0}), ["rope type 'dynamic'"]),
    (dict(rope_parameters={'rope_type': ['linear']}), ['rope type', "['linear']"]),
    (dict(rope_parameters={'rope_type': 'linear', 'factor': 'two'}), ["factor='two'"]),
    (dict(rope_parameters={'rope_type': 'linear'}), ['factor=None']),
    (dict(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'beta': 1}), ["'beta'"]),
    (dict(rope_parameters={'rope_theta': -1.0}), ['rope_theta=-1.0']),
    (dict(rope_parameters={'rope_theta': 1e-300}), ['rope_theta']),
    (dict(rope_scaling=[1, 2]), ['rope_scaling=[1, 2]']),
    (dict(rope_scaling=[1] * 999), ['rope_scaling=[1, 1']),
    (dict(rope_parameters='linear'), ["rope_parameters='linear'"]),
    (
      dict(
        rope_parameters={
          'rope_type': 'llama3',
          'factor': 8.0,
          'low_freq_factor': 4.0,
          'high_freq_factor': 1.0,
          'original_max_position_embeddings': 64,
        }
      ),
      ['high_freq_factor=1.0', 'low_freq_factor=4.0'],
    ),
  ],
  ids=lambda v: str(v)[:60] if isinstance(v, dict) else '',
)
def test_config_json(settings, no_text, model, changes, parts):
  edit_json(model / 'config.json', **changes)
  refused(settings, *parts)
