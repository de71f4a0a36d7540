"""What a run reports to people and programs: the table, the verdict, metrics.jsonl."""

import json
import types

import jax
import numpy as np
import pytest

from elder_jax import log
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.log import MetricsFile
from elder_jax.log import write_json
from elder_jax.run.plot import figure_of
from elder_jax.run.plot import plot_sweep
from elder_jax.run.report import about_text
from elder_jax.run.report import markdown
from elder_jax.run.report import table
from elder_jax.run.report import verdict


def row(recipe, wiki, news, method='elder', removed=(2, 3), tasks=None) -> dict:
  return {
    'method': method,
    'recipe': recipe,
    'removed': list(removed),
    'ppl': {'wiki': wiki, 'news': news},
    'tasks': tasks or {},
  }


def make(recipe='regularize', **changes) -> dict:
  return {
    'model': 'some/model',
    'num_layers': 6,
    'removed': [2, 3],
    'kept': [0, 1, 4, 5],
    'recipe': recipe,
    'gates': [[1.0] * 6, [1.0, 0.9, 0.1234, -0.05, 1.0, 1.0]],
    'ppl': {'wiki': {'dense': 10.126, 'pruned': 20.5}, 'news': {'dense': 7.0, 'pruned': 9999.994}},
    'rows': [  # the exported one is the last
      row('none', 123456.0, 10000.0),
      row('prune_then_train', 21.0, 10001.0),
      row('regularize', 20.5, 9999.994),
    ],
    'tasks': {'dense': {}, 'pruned': {}},
    'choices': [{'method': 'elder', 'num_remove': 2, 'chosen': [2, 3]}],
    'corpora': {
      c: {'source': f'{c}.txt', 'sha256': c[0] * 64, 'windows': 8, 'window': 32, 'bos': 'tokenizer', 'protocol': 'P/1'}
      for c in ('wiki', 'news')
    },
    'params': {'dense': 12_340_000, 'pruned': 9_255_000},
    'seconds': {'load': 1.2, 'gates': 61.7},
    'device': '1 × cpu',
    'peak_bytes': None,
    'versions': {'python': '3.11', 'jax': '0.10'},
  } | changes


def test_table():
  assert table(make()).splitlines() == [
    '| model | layers | PPL wiki | PPL news |',
    '| --- | ---: | ---: | ---: |',
    '| dense | 6 | 10.13 | 7.00 |',
    '| direct removal | 4 | 1.2e+05 | 1e+04 |',
    '| prune, then train | 4 | 21.00 | 1e+04 |',
    '| regularise, then prune (exported) | 4 | 20.50 | 9999.99 |',
  ]


def sweep() -> dict:
  def acc(value):
    return {'piqa': {'acc': value, 'acc_stderr': 0.011, 'n': 9}}

  rows = [
    row('none', 30.0, 31.0, 'sleb', [3], acc(0.6)),
    row('none', 28.0, 33.0, 'laco', [3], acc(0.5)),
    row('none', 29.0, 32.0, 'laco', [2, 3], acc(0.4)),
    row('none', 31.0, 30.0, 'sleb', [2, 3], acc(0.55)),
  ]
  choices = [
    {'method': 'sleb', 'num_remove': 2, 'chosen': [3, 2]},
    {'method': 'laco', 'num_remove': 2, 'chosen': [2, 3], 'merges': [[1, 2, 3]]},
  ]
  return make('none', rows=rows, choices=choices, gates=[], tasks={'dense': acc(0.7), 'pruned': rows[-1]['tasks']})


def test_table_of_several_methods_and_depths_with_tasks():
  assert table(sweep()).splitlines() == [
    '| model | layers chosen by | layers | PPL wiki | PPL news | piqa, % |',
    '| --- | --- | ---: | ---: | ---: | ---: |',
    '| dense |  | 6 | 10.13 | 7.00 | 70.0 ± 1.1 |',
    '| direct removal | sleb | 5 | 30.00 | 31.00 | 60.0 ± 1.1 |',
    '| direct removal | laco | 5 | 28.00 | 33.00 | 50.0 ± 1.1 |',
    '| direct removal (exported) | sleb | 4 | 31.00 | 30.00 | 55.0 ± 1.1 |',
    '| direct removal | laco | 4 | 29.00 | 32.00 | 40.0 ± 1.1 |',
  ]
  text = markdown(sweep())
  assert 'Layers merged by laco, 2 fewer: 1 ← 2, 3.' in text and '![perplexity over layers](sweep.svg)' in text
  # Only models with as many layers are compared.
  (line,) = verdict(sweep())
  assert line.startswith('On wiki, "direct removal, layers chosen by laco"') and '29.00 against 31.00' in line


def test_plot_has_a_line_for_each_way_through_its_points(tmp_path):
  figure = figure_of(sweep())
  lines = {
    axes.get_title('left'): {line.get_label(): line.get_xydata().tolist() for line in axes.lines[:-1]}
    for axes in figure.axes
  }
  assert lines == {
    'Perplexity on wiki': {
      'sleb: direct removal (exported)': [[4, 31.0], [5, 30.0], [6, 10.126]],
      'laco: direct removal': [[4, 29.0], [5, 28.0], [6, 10.126]],
    },
    'Perplexity on news': {
      'sleb: direct removal (exported)': [[4, 30.0], [5, 31.0], [6, 7.0]],
      'laco: direct removal': [[4, 32.0], [5, 33.0], [6, 7.0]],
    },
  }
  assert [axes.lines[-1].get_label() for axes in figure.axes] == ['dense', 'dense'] and figure.legends
  assert [axes.get_yscale() for axes in figure.axes] == ['log', 'log']
  plot_sweep(sweep(), tmp_path / 'sweep.svg')
  assert '<svg' in (tmp_path / 'sweep.svg').read_text() and [p.name for p in tmp_path.iterdir()] == ['sweep.svg']


def test_verdict_is_silent_where_the_exported_recipe_wins():
  assert verdict(make()) == []
  tie = make()
  tie['rows'][0]['ppl']['wiki'] = 20.5  # no better, although it comes first
  assert verdict(tie) == []


def test_verdict_names_the_best_rival_on_its_corpus():
  report = make()
  report['rows'][1]['ppl']['wiki'] = 19.25
  report['rows'][0]['ppl']['wiki'] = 20.0
  (line,) = verdict(report)
  assert line.startswith('On wiki, "prune, then train" is better than the exported "regularise, then prune"')
  assert '19.25 against 20.50' in line and 'news' not in line
  report['rows'][0]['ppl']['news'] = 5.0
  assert len(verdict(report)) == 2
  report = make(rows=[row('regularize', 20.5, 9999.0), row('none', 123456.0, 10000.0)])
  assert [line.split(',')[0] for line in verdict(report)] == ['On wiki', 'On news']


def test_markdown():
  report = make()
  text = markdown(report)
  assert text.startswith('# some/model: 6 → 4 layers\n')
  assert 'numbered as in the dense model): [2, 3]. Kept: [0, 1, 4, 5].' in text
  assert 'Parameters: 12.3 M → 9.3 M (25.0% fewer).' in text
  assert table(report) in text and 'is better than' not in text
  assert f'- wiki: wiki.txt, sha256 {"w" * 16}…, 8 windows of 32 tokens, BOS: tokenizer.' in text
  assert '- Protocol: P/1.' in text
  assert '0: 1.000, 1: 0.900, 2: 0.123, 3: -0.050, 4: 1.000, 5: 1.000.' in text  # of the last round
  assert 'Seconds: load 1, gates 62. Device: 1 × cpu.' in text and 'python 3.11, jax 0.10.' in text
  report['rows'][0]['ppl']['wiki'] = 2.0
  assert verdict(report)[0] in markdown(report)


def test_markdown_of_a_run_without_texts_and_gates():
  rows = [{'method': 'given', 'recipe': 'none', 'removed': [2, 3], 'ppl': {}, 'tasks': {}}]
  text = markdown(make('none', ppl={}, gates=[], corpora={}, rows=rows))
  assert '|' not in text and 'Protocol' not in text and 'Gates' not in text and 'Parameters' in text


def test_versions_and_device():
  versions = package_versions()
  assert versions['jax'] == jax.__version__ and all(versions.values())
  assert device_name().startswith(f'{len(jax.devices())} × ')


def test_write_json_leaves_no_half_file(tmp_path):
  path = tmp_path / 'report.json'
  write_json(path, {'a': [1, 'ü']})
  assert json.loads(path.read_text()) == {'a': [1, 'ü']} and [p.name for p in tmp_path.iterdir()] == ['report.json']
  with pytest.raises(TypeError):
    write_json(path, {'a': object()})
  assert json.loads(path.read_text()) == {'a': [1, 'ü']}


def steps(path) -> list[tuple]:
  return [(row['stage'], row['step']) for row in map(json.loads, path.read_text().splitlines())]


def test_metrics_begin_drops_what_will_be_written_again(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  metrics = MetricsFile(path)
  metrics.begin('gates', 0)
  assert not path.exists()
  for stage in ('gates', 'regularize'):
    for i in range(4):
      metrics.write(stage, i, {'loss': np.float32(i).item(), 'delta_L': np.arange(2.0)}, round=0)
  assert json.loads(path.read_text().splitlines()[1]) == {
    'stage': 'gates',
    'step': 1,
    'round': 0,
    'loss': 1.0,
    'delta_L': [0.0, 1.0],
  }
  gates = [('gates', i) for i in range(4)]
  metrics.begin('regularize', 2)
  assert steps(path) == gates + [('regularize', 0), ('regularize', 1)]
  metrics.write('regularize', 2, {'loss': 1.0})
  assert steps(path) == gates + [('regularize', i) for i in range(3)]
  metrics.begin('gates', 0)
  assert steps(path) == [('regularize', i) for i in range(3)]


@pytest.mark.parametrize('half', ['{"stage": "gates", "st', '{', '{"stage": "gates", "step": 2, "loss": 1.0}'])
def test_metrics_begin_drops_a_last_line_that_a_kill_cut_off(tmp_path, half):
  path = tmp_path / 'metrics.jsonl'
  metrics = MetricsFile(path)
  for i in range(2):
    metrics.write('gates', i, {'loss': 1.0})
  with path.open('a') as file:
    file.write(half)
  metrics.begin('regularize', 0)
  metrics.write('regularize', 0, {'loss': 1.0})
  whole = [('gates', 2)] if half.endswith('}') else []
  assert steps(path) == [('gates', 0), ('gates', 1), *whole, ('regularize', 0)]


def test_rows_have_the_time_and_the_speed_except_the_first_which_compiles(tmp_path, monkeypatch):
  path, clock = tmp_path / 'metrics.jsonl', iter([10.0, 12.0, 12.5])
  monkeypatch.setattr(log.time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(log.time, 'time', lambda: 1.7e9)
  heard = []
  run_log, listener = (
    log.RunLog(path),
    types.SimpleNamespace(
      begin=lambda *args: heard.append(args), write=lambda stage, step, metrics: heard.append((step, metrics))
    ),
  )
  run_log.add_listener(listener)
  record = run_log.steps('gates', tokens=100)
  for i in range(3):
    record(i, {'loss': 1.0}, round=0)
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row['tokens_per_second'] for row in rows] == [None, 50.0, 200.0] and rows[0]['time'] == 1.7e9
  assert heard[0] == ('gates', 0) and heard[2] == (1, {'loss': 1.0, 'tokens_per_second': 50.0, 'round': 0})


def test_training_texts_are_listed_if_there_are_several_or_one_repeats():
  one = {'name': 'a', 'source': 'a', 'weight': 1.0, 'rows': 10, 'tokens': 99, 'times': 1.0}
  report = {'train_data': [one], 'steps': 5, 'tokens_per_step': 100}
  assert about_text(report) == []
  report['train_data'] = [one | {'times': 2.5}]
  assert '2.5' in about_text(report)[0]
  report['train_data'] = [one | {'weight': 0.75, 'rows': 30}, one | {'name': 'b', 'weight': 0.25}]
  assert '| a | 0.750 | 375 | 75.00% | 1.0 |' in about_text(report)[0]
  assert about_text({}) == []  # as in a report of an earlier version
