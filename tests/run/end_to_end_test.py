"""Whole runs on a tiny model: the work folder, resuming, determinism, methods and recipes."""

import gc
import json
import pathlib
import weakref

import numpy as np
import pytest
import safetensors.numpy
from tiny import Endless
from tiny import config_of
from tiny import slow

from elder_jax.methods import elder
from elder_jax.run import job as job_module
from elder_jax.run import pipeline
from elder_jax.run import work as work_module
from elder_jax.run.config import PLACES
from elder_jax.training import trainer
from elder_jax.training.batches import Batches
from elder_jax.training.loop import run_steps


def run(settings, **more):
  return pipeline.run(config_of(**{**settings, **more}))


def exported(workdir) -> dict:
  return safetensors.numpy.load_file(pathlib.Path(workdir) / 'export' / 'model.safetensors')


def without_time(report):
  return {k: v for k, v in report.items() if k != 'seconds'}


def test_report_and_work_folder(settings):
  report = run(settings, compare=['none', 'prune_then_train'], verify='torch')
  work = pathlib.Path(settings['workdir'])
  assert json.loads((work / 'report.json').read_text()) == report
  assert report['num_layers'] == 6 and len(report['removed']) == 2
  assert sorted(report['removed'] + report['kept']) == list(range(6))
  assert not {0, 5} & set(report['removed'])  # the protected ends
  assert len(report['gates']) == 2 and len(report['gates'][0]) == 6
  assert [row['recipe'] for row in report['rows']] == ['none', 'prune_then_train', 'regularize']
  assert report['ppl']['text']['pruned'] == report['rows'][-1]['ppl']['text']
  assert len({row['ppl']['text'] for row in report['rows']}) == 3
  assert report['ppl']['text']['dense'] > 1 and report['corpora']['text']['windows'] == 8
  assert report['params']['dense'] > report['params']['pruned']
  assert report['verify']['torch'] <= 1e-4 and len(report['verify']['generated']) == 32
  assert {'load', 'dense', 'choose-elder-2', 'train_regularize', 'evaluate_regularize', 'export'} <= set(
    report['seconds']
  )
  assert {'jax', 'flax', 'python'} <= set(report['versions']) and report['schema'] == 2

  lines = [json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()]
  steps = [(line['stage'], line['step']) for line in lines]
  assert steps == [(s, i) for s, n in (('gates', 4), ('prune_then_train', 3), ('regularize', 3)) for i in range(n)]
  assert all(np.isfinite(line['loss']) for line in lines)
  regularized = [line for line in lines if line['stage'] == 'regularize']
  assert all(line['penalty'] > 0 for line in regularized)
  assert all(line['penalty'] == 0 for line in lines if line['stage'] == 'prune_then_train')
  markdown = (work / 'report.md').read_text()
  assert 'direct removal' in markdown and str(report['removed']) in markdown
  assert sorted(p.name for p in work.iterdir()) == [
    'config.json',
    'export',
    'inputs.json',
    'metrics.jsonl',
    'report.html',
    'report.json',
    'report.md',
    'stages',
  ]


def test_the_report_depends_on_the_seed_only(settings, tmp_path):
  a = run(settings, workdir=str(tmp_path / 'a'))
  b = run(settings, workdir=str(tmp_path / 'b'))
  c = run(settings, workdir=str(tmp_path / 'c'), seed=1)
  assert without_time(a) == without_time(b)
  assert a['ppl'] != c['ppl']
  for name, tensor in exported(tmp_path / 'a').items():
    np.testing.assert_array_equal(tensor, exported(tmp_path / 'b')[name])


@pytest.mark.parametrize('stage', [slow('gates'), 'regularize'])
def test_a_killed_run_resumes_exactly(settings, tmp_path, monkeypatch, stage):
  settings |= dict(checkpoint_every=2, train_steps=5)
  straight = run(settings, workdir=str(tmp_path / 'straight'))

  fit, calls = run_steps, []

  class Killed(BaseException):
    pass

  def dying_fit(step_fn, state, fixed, steps, batches, terms, log, *save):
    def dying_batch(i):
      if stage == ('gates' if steps != 5 else 'regularize') and i == 3:
        calls.append(i)
        raise Killed
      return batches[i]

    return fit(step_fn, state, fixed, steps, Endless(dying_batch), terms, log, *save)

  for module in (elder, trainer):
    monkeypatch.setattr(module, 'run_steps', dying_fit)
  with pytest.raises(Killed):
    run(settings)
  assert calls == [3] and not (pathlib.Path(settings['workdir']) / 'export').exists()
  for module in (elder, trainer):
    monkeypatch.setattr(module, 'run_steps', fit)
  resumed = run(settings)
  assert without_time(resumed) == without_time(straight)
  for name, tensor in exported(tmp_path / 'straight').items():
    np.testing.assert_array_equal(tensor, exported(settings['workdir'])[name])

  def lines(work):
    rows = [json.loads(l) for l in (pathlib.Path(work) / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ('time', 'tokens_per_second')} for row in rows]

  assert lines(settings['workdir']) == lines(tmp_path / 'straight')


def test_a_finished_run_is_not_repeated(settings, monkeypatch):
  report = run(settings)
  monkeypatch.setattr(job_module, 'load_model', lambda *args: pytest.fail('the model was loaded again'))
  assert run(settings) == report


@pytest.mark.slow
def test_one_run_of_several_methods_and_recipes_equals_single_runs(settings, tmp_path):
  settings |= dict(compare=['none'], recipe='prune_then_train')
  together = run(settings, method='shortgpt,laco,random')
  rows = {(row['method'], row['recipe']): row for row in together['rows']}
  assert list(rows)[-1] == ('shortgpt', 'prune_then_train') and len(rows) == 6 == len(together['rows'])
  for method in ('shortgpt', 'laco', 'random'):
    alone = run(settings, method=method, workdir=str(tmp_path / method))
    assert [rows[method, recipe] for recipe in ('none', 'prune_then_train')] == alone['rows']
  assert len({row['ppl']['text'] for row in together['rows']}) == 6
  # LaCo merges layers, which differs from removing them.
  layers = ','.join(map(str, rows['laco', 'none']['removed']))
  removed = run(settings, num_remove=None, remove_layers=layers, workdir=str(tmp_path / 'given'))
  assert removed['rows'][0]['ppl'] != rows['laco', 'none']['ppl']
  assert 'Layers merged by laco, 2 fewer: ' in (pathlib.Path(settings['workdir']) / 'report.md').read_text()


@pytest.mark.slow
def test_a_sweep_takes_a_prefix_of_one_order_or_chooses_again(settings, tmp_path):
  settings |= dict(compare=[], recipe='none', num_remove=None, gate_steps=1)
  swept = run(settings, ratio='0.33,0.17,0.5', method='elder,cosine_block')
  rows = {(row['method'], len(row['removed'])): row for row in swept['rows']}
  assert set(rows) == {(m, n) for m in ('elder', 'cosine_block') for n in (1, 2, 3)}
  assert list(rows)[-1] == ('elder', 2) and len(swept['kept']) == 4
  assert set(rows['elder', 1]['removed']) < set(rows['elder', 2]['removed']) < set(rows['elder', 3]['removed'])
  for method, n in (('elder', 1), ('cosine_block', 1), ('cosine_block', 3)):
    alone = run(settings, num_remove=n, method=method, workdir=str(tmp_path / f'{method}{n}'))
    assert alone['rows'] == [rows[method, n]]
  work = pathlib.Path(settings['workdir'])
  assert '<svg' in (work / 'sweep.svg').read_text() and 'sweep.svg' in (work / 'report.md').read_text()


def test_a_killed_comparison_repeats_no_model(settings, monkeypatch):
  settings |= dict(method='shortgpt,random', compare=['absorb'], recipe='absorb_then_train')
  made, apply = [], work_module.apply_recipe

  def dying(run, stage, choice):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(stage.recipe)
    return apply(run, stage, choice)

  with monkeypatch.context() as patch:
    patch.setattr(work_module, 'apply_recipe', dying)
    with pytest.raises(KeyboardInterrupt):
      run(settings)
  before, made = made, []
  monkeypatch.setattr(
    work_module, 'apply_recipe', lambda run, stage, choice: made.append(stage.recipe) or apply(run, stage, choice)
  )
  monkeypatch.setattr(work_module.methods, 'choose', lambda *_: pytest.fail('layers were chosen again'))
  report = run(settings)
  assert len(before) + len(made) == 4 == len(report['rows'])


def test_the_model_of_the_previous_row_is_freed(settings, monkeypatch):
  make, made, kept = work_module.apply_recipe, [], []

  def apply_recipe(*args, **how):
    gc.collect()
    kept.extend(model() for model in made if model() is not None)
    model = make(*args, **how)
    made.append(weakref.ref(model))
    return model

  monkeypatch.setattr(work_module, 'apply_recipe', apply_recipe)
  run(settings, method='last', recipe='prune_then_train', compare=['none', 'absorb'])
  assert len(made) == 3 and not kept


def test_given_layers_skip_stage_1(settings):
  report = run(settings, num_remove=None, remove_layers='3,1', recipe='none')
  assert report['removed'] == [1, 3] and report['gates'] == [] and report['method'] == 'given'


def test_removing_no_layers_without_text_copies_the_weights(settings, tiny):
  run(settings, num_remove=None, remove_layers='', recipe='none', train_data='', eval_data=())
  source = safetensors.numpy.load_file(tiny / 'model.safetensors')
  result = exported(settings['workdir'])
  assert source.keys() == result.keys()
  for name in source:
    np.testing.assert_array_equal(source[name], result[name])


def test_recipes_see_the_same_batches(settings, monkeypatch):
  seen = []
  batch = Batches.__getitem__
  monkeypatch.setattr(Batches, '__getitem__', lambda self, i: seen.append(np.asarray(batch(self, i))) or batch(self, i))
  run(settings, compare=['prune_then_train'], num_remove=None, remove_layers='2')
  assert len(seen) == 6
  np.testing.assert_array_equal(seen[:3], seen[3:])


def test_config_json_reproduces_the_run(settings, tmp_path):
  first = run(settings)
  saved = json.loads((pathlib.Path(settings['workdir']) / 'config.json').read_text())
  saved |= {'workdir': str(tmp_path / 'again')}
  assert set(saved) == set(PLACES)
  assert without_time(pipeline.run(config_of(**saved))) == without_time(first)
