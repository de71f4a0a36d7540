"""Several runs as one: a search for the number of layers, rounds, and seeds. Also targets, which need no extra run."""

import json
import pathlib

import numpy as np
import pytest
from tiny import config_of

import elder_jax as ej
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.run import how_much
from elder_jax.run import series
from elder_jax.run.report import markdown


def run(settings: dict, **more) -> dict:
  return series.run(config_of(**{**settings, **more}))


@pytest.fixture
def settings(settings) -> dict:
  quick = dict(method='last', recipe='absorb_then_train', compare=(), train_steps=None, prompts='none')
  return settings | quick | dict(num_sequences=16)


# ---- targets ----


@pytest.mark.parametrize(
  ('target', 'expected'),
  [
    (lambda params: dict(target_params=params(4)), 2),
    (lambda params: dict(target_params=params(4) - 1), 3),
    (lambda params: dict(target_params=params(6)), 0),
    (lambda params: dict(target_gb=params(3) * 4 / 1e9 * (1 + 1e-9)), 3),
    (lambda params: dict(target_gb=params(3) * 4 / 1e9 * (1 + 1e-9), export_dtype='float16'), 0),
    (lambda params: dict(target_gb=params(4) * 2 / 1e9 * (1 + 1e-9), export_dtype='bfloat16'), 2),
  ],
)
def test_targets_of_size(settings, tiny, tmp_path, target, expected):
  source = open_source(str(tiny), tmp_path / 'source')

  def params(num_layers: int) -> int:
    return how_much._params(source.spec, num_layers, 'float32')

  assert params(6) == ej.load(str(tiny)).num_params
  config = config_of(**settings | dict(num_remove=None) | target(params))
  assert how_much.count_removed(config, source.spec, 6, 'float32') == [expected]


def test_target_of_speed(settings, tiny, tmp_path, capsys):
  source = open_source(str(tiny), tmp_path / 'source')
  whole, less = (how_much._read_for_a_token(source.spec, n, 'float32') for n in (6, 4))
  for target, expected in ((whole / less - 1e-6, 2), (whole / less + 1e-6, 3)):
    config = config_of(**settings | dict(num_remove=None, target_speedup=target))
    assert how_much.count_removed(config, source.spec, 6, 'float32') == [expected]
  assert f'removing {expected} of 6 layers' in capsys.readouterr().err


def test_an_impossible_target(settings):
  with pytest.raises(InputError, match='target_params=10: even a single layer cannot meet it'):
    run(settings, num_remove=None, target_params=10)


def test_a_run_with_a_target(settings):
  report = run(settings, num_remove=None, target_gb=1.6e-4)
  assert report['params']['pruned'] * 4 <= 1.6e5 < report['params']['dense'] * 4 and len(report['removed']) == 2
  assert json.loads((pathlib.Path(settings['workdir']) / 'config.json').read_text())['target_gb'] == 1.6e-4


# ---- the search ----


@pytest.mark.slow
def test_the_search_removes_as_many_layers_as_the_limit_allows(settings):
  searched = settings | dict(num_remove=None, validation_sequences=4)
  report = run(searched, max_ppl_increase=0.2)
  tried = dict(report['search'])
  n = len(report['removed'])
  assert tried[n] <= 0.2 < tried.get(n + 1, 1.0)
  assert (pathlib.Path(settings['workdir']) / 'export' / 'config.json').exists()
  assert 'most layers at up to 20.0% more' in markdown(report)
  assert report['ppl'] and report['steps'] == 4
  held_out = report['rows'][-1]
  assert held_out['recipe'] == 'absorb_then_train'


def test_a_limit_below_the_increase_of_one_layer(settings, monkeypatch):
  monkeypatch.setattr(series, '_held_out', lambda config, n: (1.0, 1.5))
  with pytest.raises(InputError, match=r'max_ppl_increase=1e-09: removing one layer raises it by'):
    run(settings, num_remove=None, max_ppl_increase=1e-9, method='shortgpt')


# ---- rounds ----


@pytest.mark.slow
def test_two_rounds_equal_two_runs(settings, tmp_path):
  report = run(settings, rounds=2, num_remove=3, method='shortgpt', distill=0.5)
  first = run(settings, num_remove=2, method='shortgpt', distill=0.5, num_sequences=8, export_dtype='float32',
              workdir=str(tmp_path / 'first'))  # fmt: skip
  second = run(settings, num_remove=1, method='shortgpt', distill=0.5, num_sequences=8, seed=1,
               model=str(tmp_path / 'first' / 'export'), teacher=settings['model'],
               workdir=str(tmp_path / 'second'))  # fmt: skip
  left = [l for l in range(6) if l not in first['removed']]
  assert report['removed'] == sorted(first['removed'] + [left[l] for l in second['removed']])
  assert report['kept'] == [l for l in range(6) if l not in report['removed']] and report['num_layers'] == 6
  assert report['ppl']['text'] == {
    'dense': first['ppl']['text']['dense'],
    'pruned': pytest.approx(second['ppl']['text']['pruned'], rel=1e-5),
  }
  assert [len(row['removed']) for row in report['rows']] == [2, 3]
  text = markdown(report)
  assert 'round 1' in text and 'round 2 (exported)' in text and '6 → 3 layers' in text
  card = (pathlib.Path(settings['workdir']) / 'export' / 'README.md').read_text()
  name = pathlib.Path(settings['model']).name
  assert f'# {name}, 3 of 6 layers' in card and 'round 2 (exported)' in card and f'1. {name}: 2 of 6 layers' in card
  exported = ej.load(f'{settings["workdir"]}/export')
  assert exported.num_layers == 3
  lineage = json.loads((pathlib.Path(settings['workdir']) / 'export' / 'elder_jax.json').read_text())['lineage']
  assert [step['layers'] for step in lineage] == [6, 4]


@pytest.mark.parametrize(
  'more', [dict(num_remove=None, remove_layers='1,2'), dict(method='last,random'), dict(num_remove=1)]
)
def test_rounds_that_are_refused(settings, more):
  with pytest.raises(InputError, match='rounds=2'):
    run(settings, rounds=2, **more)


def test_a_stopped_series_resumes(settings, tmp_path, monkeypatch):
  whole = run(settings, rounds=2, workdir=str(tmp_path / 'whole'))
  calls = []

  def reached():
    calls.append(1)
    return len(calls) == 4  # in the second round

  monkeypatch.setattr(preemption, 'reached', reached)
  with pytest.raises(preemption.Preempted):
    run(settings, rounds=2)
  monkeypatch.undo()
  again = run(settings, rounds=2)
  assert again['ppl'] == whole['ppl'] and again['removed'] == whole['removed']
  assert run(settings, rounds=2)['ppl'] == whole['ppl']  # finished, so it only returns the report
  with pytest.raises(InputError, match='workdir'):
    run(settings, rounds=1)


# ---- seeds ----


@pytest.mark.slow
def test_seeds_have_mean_and_deviation(settings, tmp_path):
  report = run(settings, seeds=(0, 3), compare=('none',))
  alone = [run(settings, seed=s, compare=('none',), workdir=str(tmp_path / str(s))) for s in (0, 3)]
  values = [r['ppl']['text']['pruned'] for r in alone]
  row = report['seeds']['rows'][-1]
  assert row['recipe'] == 'absorb_then_train' and row['ppl']['text']['values'] == values and values[0] != values[1]
  assert row['ppl']['text']['mean'] == pytest.approx(np.mean(values))
  assert row['ppl']['text']['deviation'] == pytest.approx(np.std(values, ddof=1))
  assert report['ppl'] == alone[0]['ppl']
  assert f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}' in markdown(report)
  assert (pathlib.Path(settings['workdir']) / 'export' / 'config.json').exists()
  assert not (pathlib.Path(settings['workdir']) / 'runs' / 'seed_3' / 'export').exists()
