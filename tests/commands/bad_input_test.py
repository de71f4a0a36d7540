"""Bad settings and work folders are refused in one sentence that names the flag, before any long work."""

import pathlib

import jax
import pytest
from refusal import refused
from tiny import config_of

from elder_jax.devices import sharding
from elder_jax.hf import verify
from elder_jax.run import pipeline

pytestmark = pytest.mark.usefixtures('no_long_work')


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
    (dict(num_remove=None, ratio='0.1,x'), ['--ratio=0.1,x', 'numbers, separated by commas']),
    (dict(num_remove=None, ratio='0.1,nan'), ['--ratio=0.1,nan', 'below 1']),
    (dict(method='elder,slep'), ['--method=slep', 'is not known', 'sleb']),
    (dict(method='laco', num_remove=5), ['--method=laco', 'not 5']),
    (dict(method='taylor', num_remove=1), ['--method=taylor', '0 of the 6', 'not 1;']),
    (dict(method='shortgpt', num_remove=6), ['6 layers', 'of 6', 'keep at least one']),
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
    (dict(distill='0.9:0.5:0.1'), ['--distill=0.9,0.5,0.1', 'one weight, or the weights']),
    (dict(distill=''), ['--distill=', 'one weight, or the weights']),
    (dict(distill='half'), ['--distill=half', 'numbers']),
    (dict(num_remove=None, ratio='0.1:0.2'), ['--ratio=0.1:0.2', 'numbers, separated by commas']),
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
  def touch(self, *args, **kwargs):  # simulated, because root may write everywhere
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
  refused(settings, f'--workdir={model}', 'not from an earlier run', workdir=str(model))
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
  refused(settings, f'--workdir={work}', 'not from an earlier run', 'config.json')


def test_a_home_that_does_not_exist(settings, tmp_path, no_text, monkeypatch):
  monkeypatch.chdir(tmp_path)
  refused(settings, '--model=~no_such_user/x', model='~no_such_user/x')
  refused(settings, '--model=~no_such_user/x.gguf', model='~no_such_user/x.gguf')
  refused(settings, '--model', model='', workdir='~no_such_user/work')
