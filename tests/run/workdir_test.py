"""The work folder: one run at a time, recorded inputs, and what a failed run keeps."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from refusal import edit_json
from refusal import refused
from tiny import config_of
from tiny import names

from elder_jax.errors import InputError
from elder_jax.hf import manifest
from elder_jax.hf.save import config_of as config_of_export
from elder_jax.methods import elder
from elder_jax.run import card
from elder_jax.run import checks
from elder_jax.run import inputs
from elder_jax.run import job as job_module
from elder_jax.run import pipeline
from elder_jax.run import results
from elder_jax.run import workdir
from elder_jax.text import identity
from elder_jax.training import trainer
from elder_jax.training.loop import NonFiniteLoss


def run(settings, **more) -> dict:
  return pipeline.run(config_of(**{**settings, **more}))


@pytest.fixture
def own_text(settings, text, tmp_path) -> pathlib.Path:
  """A copy of the evaluation text of `settings`, which a test may change."""
  path = tmp_path / 'own.txt'
  shutil.copy(text, path)
  settings['eval_data'] = (f'text={path}',)
  return path


def killed_before_training(settings, monkeypatch):
  with monkeypatch.context() as patch:
    for module in (elder, trainer):
      patch.setattr(module, 'run_steps', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
      run(settings)


# ---- one run at a time ----


HOLDER = """
import sys, time
from elder_jax.run import workdir
from elder_jax.run.config import Config
with workdir.held(Config.of(workdir=sys.argv[1])):
  print('held', flush=True)
  time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends(settings):
  env = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2]), 'JAX_PLATFORMS': 'cpu'}
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, settings['workdir']], stdout=subprocess.PIPE, env=env, text=True
  )
  assert holder.stdout.readline() == 'held\n'
  message = refused(
    settings, f'--workdir={settings["workdir"]}', 'another run is using it', f'process {holder.pid} on '
  )
  assert f'since {time.strftime("%Y")}' in message
  holder.kill()  # the kernel releases the lock, even though the file remains
  holder.wait()
  assert names(settings['workdir']) == ['.lock']
  assert pipeline.prepare(config_of(**settings)).num_removes == [2]


def test_a_refused_run_leaves_nothing_behind(settings, tmp_path):
  refused(settings, '--train_data', workdir=str(tmp_path / 'new' / 'deep'), train_data=str(tmp_path / 'absent.txt'))
  assert not (tmp_path / 'new').exists()
  mine = tmp_path / 'mine'
  (mine / 'source').mkdir(parents=True)
  (mine / 'source' / 'thesis.tex').touch()
  refused(settings, '--train_data', workdir=str(mine), train_data=str(tmp_path / 'absent.txt'))
  assert names(mine) == ['source'] and names(mine / 'source') == ['thesis.tex']


@pytest.mark.parametrize('name', workdir.FILES + workdir.FOLDERS)
def test_a_folder_in_place_of_a_file_or_the_reverse_is_refused(settings, no_long_work, no_text, name):
  work = pathlib.Path(settings['workdir'])
  work.mkdir()
  if name == workdir.LOCK:  # opened before this check
    return
  if name in workdir.FILES:
    (work / name).mkdir()
  else:
    (work / name).touch()
  refused(settings, f'--workdir={work}', name, 'move what is there away')


# ---- inputs ----


@pytest.mark.slow
def test_a_resumed_run_refuses_another_text_under_the_old_name(settings, own_text, monkeypatch):
  killed_before_training(settings, monkeypatch)
  before = own_text.read_bytes()
  own_text.write_text('Something else. ' * 500)
  refused(settings, '--eval_data=text=', str(own_text), 'has changed since the run', 'started')
  own_text.write_bytes(before)
  assert run(settings)['ppl']['text']['dense'] > 1


def test_a_resumed_run_refuses_another_model_and_tokenizer_under_the_old_name(settings, model, monkeypatch):
  killed_before_training(settings, monkeypatch)
  config, tokenizer = (model / 'config.json').read_text(), (model / 'tokenizer.json').read_text()
  edit_json(model / 'config.json', rms_norm_eps=1e-3)
  refused(settings, f'--model={model}', 'has changed since the run')
  (model / 'config.json').write_text(config)
  vocabulary = json.loads(tokenizer)
  vocabulary['model']['vocab']['a'], vocabulary['model']['vocab']['b'] = (vocabulary['model']['vocab'][c] for c in 'ba')
  (model / 'tokenizer.json').write_text(json.dumps(vocabulary))
  refused(settings, f'--tokenizer={model}', 'has changed since the run')
  (model / 'tokenizer.json').write_text(tokenizer)
  for path in model.iterdir():  # the same contents with other times
    os.utime(path, (1, 1))
  assert run(settings)['num_layers'] == 6


def test_large_files_are_distinguished_by_size_and_samples(tmp_path, monkeypatch):
  monkeypatch.setattr(identity, '_SAMPLE', 16)
  monkeypatch.setattr(identity, '_SAMPLES', 4)
  path = tmp_path / 'a'
  seen = set()
  content = bytes(range(200))
  for changed in (
    content,
    content[:-1],
    content[:-1] + b'x',
    b'x' + content[1:],
    content[:70] + b'xxxxxx' + content[76:],
  ):
    path.write_bytes(changed)
    seen.add(identity.of_files([path]))
  assert len(seen) == 5


# ---- failures ----


def test_a_failed_run_may_change_its_settings(settings, monkeypatch):
  with pytest.raises(NonFiniteLoss):
    run(settings, lr=1e30, train_steps=5)
  work = pathlib.Path(settings['workdir'])
  assert (work / 'failed.txt').read_text().startswith('the ')
  chosen = (work / 'stages' / 'choose-elder-2.json').read_bytes()
  settings |= dict(train_steps=5)
  report = run(settings)  # with another --lr
  assert (work / 'stages' / 'choose-elder-2.json').read_bytes() == chosen and not (work / 'failed.txt').exists()
  alone = run(settings, workdir=f'{work}2')
  assert report['ppl'] == alone['ppl']
  refused(settings, '--lr=0.001, not 0.002', lr=0.002)  # a finished run may not change them


@pytest.mark.parametrize(
  'changes, kept',
  [
    (dict(export_dtype='bfloat16'), ['choose-elder-2', 'dense', 'none', 'regularize', 'source']),
    (dict(eval_tokens=128), ['choose-elder-2', 'source']),
    (dict(distill=0.5), ['choose-elder-2', 'dense', 'source']),
    (dict(gate_lr=0.1), ['dense', 'source']),
    (dict(eval_tokens=128, gate_lr=0.1), ['source']),
    (dict(seq_len=16), []),
  ],
  ids=str,
)
def test_results_that_do_not_depend_on_a_changed_setting_are_kept(settings, changes, kept):
  pipeline.prepare(config_of(**settings))
  work = pathlib.Path(settings['workdir'])
  (work / 'stages').mkdir()
  for name in ('dense', 'choose-elder-2', 'none', 'regularize', 'source'):
    (work / 'stages' / f'{name}.json').write_text('{}')
  for name in ('gates', 'regularize'):
    (work / 'checkpoints' / name / '5').mkdir(parents=True)
  (work / workdir.FAILED).touch()
  pipeline.prepare(config_of(**settings | changes))
  assert names(work / 'stages') == [f'{name}.json' for name in kept]
  trained = {'export_dtype', 'eval_tokens'} >= set(changes)
  chosen = 'choose-elder-2' in kept
  assert names(work / 'checkpoints') == ['gates'] * chosen + ['regularize'] * trained
  assert json.loads((work / 'config.json').read_text()) == config_of(**settings | changes).to_json()


@pytest.mark.parametrize('content', [b'', b'{"result"', b'[]', b'{}', b'\xff\xfe'])
def test_an_unreadable_stage_is_repeated(settings, monkeypatch, capsys, content):
  killed_before_training(settings, monkeypatch)
  path = pathlib.Path(settings['workdir']) / 'stages' / 'dense.json'
  right = json.loads(path.read_text())['result']
  path.write_bytes(content)
  assert run(settings)['ppl']['text']['dense'] == right['ppl']['text']
  assert f'{path}: cannot be read' in capsys.readouterr().err


def test_the_default_ratio_equals_unset(settings):
  settings |= dict(num_remove=None)
  for before, after in (('0.25', None), (None, '0.25')):  # earlier versions wrote it out
    pipeline.prepare(config_of(**settings | dict(ratio=before)))
    pipeline.prepare(config_of(**settings | dict(ratio=after)))
  refused(settings, '--ratio=unset, not 0.3', ratio='0.3')


def test_an_unreadable_report_is_refused(settings):
  run(settings, recipe='none')
  path = pathlib.Path(settings['workdir']) / 'report.json'
  path.write_bytes(b'{"schema"')
  refused(settings, path, 'cannot be read', 'remove it', recipe='none')


def test_a_finished_run_reads_neither_text_nor_model(settings, monkeypatch):
  report = run(settings, recipe='none')
  monkeypatch.setattr(pipeline, 'prepare', lambda config: pytest.fail('a finished run was prepared again'))
  assert run(settings, recipe='none') == report


# ---- what could fail at the end is tried at the start ----


def test_a_report_that_fails_is_found_before_the_model_is_loaded(settings, monkeypatch, capsys):
  def broken(report):
    raise KeyError('acc_stderr')

  class Loading(Exception):
    pass

  def load(*args):
    raise Loading

  monkeypatch.setattr(results, 'markdown', broken)
  monkeypatch.setattr(job_module, 'load_model', load)
  with pytest.raises(Loading):
    run(settings)
  assert "report.md could not be written (KeyError: 'acc_stderr')" in capsys.readouterr().err
  monkeypatch.setattr(results, 'model_card', lambda report, config: broken(report))
  with pytest.raises(KeyError):
    run(settings)


@pytest.mark.parametrize('name', ['markdown', 'model_card', 'plot_sweep'])
def test_a_failing_report_does_not_lose_the_export(settings, monkeypatch, capsys, name):
  settings |= dict(recipe='none', compare=(), num_remove=None, ratio='0.33,0.17', method='last', verify='jax')
  function, calls = getattr(results, name), []

  def fails_at_the_end(*args):
    calls.append(1)
    if len(calls) > 1:
      raise ValueError('no such figure')
    return function(*args)

  for module in (results, card):
    monkeypatch.setattr(module, name, fails_at_the_end, raising=False)
  report = run(settings)
  work = pathlib.Path(settings['workdir'])
  assert manifest.check(work / 'export') and json.loads((work / 'report.json').read_text()) == report
  file = {'markdown': 'report.md', 'model_card': 'README.md', 'plot_sweep': 'sweep.svg'}[name]
  assert f'{file} could not be written (no such figure)' in capsys.readouterr().err
  assert not (work / file).exists() and not (work / 'export' / file).exists()


def test_a_disk_without_room_is_found_before_the_text_is_read(settings, no_text, no_long_work, monkeypatch):
  usage = shutil.disk_usage
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(path)._replace(free=100))
  refused(settings, f'--workdir={settings["workdir"]}', 'the export needs', 'GB free')


def test_a_wrongly_cut_config_is_found_before_the_text_is_read(settings, no_text, no_long_work, monkeypatch):
  monkeypatch.setattr(checks, 'config_of', lambda *args: config_of_export(*args) | {'num_hidden_layers': 5})
  refused(settings, '--model=', 'cannot be cut to 4 layers')


# ---- settings ----


@pytest.mark.parametrize(
  'more, parts',
  [
    (dict(num_remove=0), ['--recipe=regularize', 'no layer is removed', '--recipe=none']),
    (dict(num_remove=None, ratio='0.3,0', distill=0.5), ['--distill=0.5', 'from itself']),
    (dict(num_remove=None, ratio='0.3,0', distill='0.9:0.5'), ['--distill=0.9,0.5', 'from itself']),
    (dict(num_remove=None, ratio='0.3,0', distill_hidden=0.5), ['--distill_hidden=0.5', 'from itself']),
    (dict(ratio='0.2'), ['--ratio=0.2: and --num_remove', 'only one']),
    (dict(remove_layers='2'), ['--num_remove=2: and --remove_layers', 'only one']),
    (dict(optimizer='adam'), ['--optimizer=adam', 'adamw']),
    (dict(bos='windows'), ['--bos=windows', 'tokenizer']),
    (dict(recipe='regularise'), ['--recipe=regularise', 'regularize']),
  ],
)
def test_contradictory_or_misspelt_settings(settings, no_text, no_long_work, more, parts):
  refused(settings, *parts, **more)


def test_an_input_is_recorded_by_its_resolved_path(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').touch()
  monkeypatch.chdir(tmp_path)
  assert inputs.named('x', 'a.txt') == inputs.named('x', f'{tmp_path}/a.txt') == f'x={tmp_path}/a.txt'
  assert inputs.named('x', 'owner/name:train') == 'x=owner/name:train'
  (tmp_path / 'inputs.json').write_text(json.dumps({'x=a': 'a' * 64}))
  inputs.check(tmp_path, {'x=a': 'a' * 64, 'y=b': 'b' * 64})
  with pytest.raises(InputError, match='x=a: has changed since the run'):
    inputs.check(tmp_path, {'x=a': 'c' * 64})
