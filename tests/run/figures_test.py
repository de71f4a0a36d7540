"""Figures that are missing, not numbers, or not finite: each figure of each table is tried as each of these."""

import copy
import json
import math

import pytest
from report_test import make
from report_test import sweep

from elder_jax.commands import evaluate
from elder_jax.commands import speed
from elder_jax.log import write_json
from elder_jax.run import timing
from elder_jax.run.card import model_card
from elder_jax.run.plot import plot_sweep
from elder_jax.run.report import markdown
from elder_jax.run.report import table
from elder_jax.run.report import verdict

MISSING = object()
BAD = [MISSING, None, 'N/A', math.nan, math.inf, -math.inf, 1e300]
SETTINGS = (
  *('num_layers', 'removed', 'kept', 'chosen', 'num_remove', 'merges'),
  *('corpora', 'settings', 'layers', 'steps', 'tokens_per_step'),
)
CARD = {'remove_layers': None, 'lr': 1e-3}


def report() -> dict:
  """A report with everything that one can have."""
  tasks = {
    'piqa': {'acc': 0.7, 'acc_stderr': 0.011, 'n': 9},
    'wiki': {'word_perplexity': 20.0, 'word_perplexity_stderr': 0.5, 'n': 3},
  }
  made = sweep() | {
    'peak_bytes': 2**30,
    'steps': 2,
    'tokens_per_step': 128,
    'gates': [[1.0, 0.9, 0.1]],
    'method': 'sleb',
  }
  made['tasks'] = {'dense': tasks, 'pruned': tasks}
  made['versions'] |= {'elder_jax': '1'}
  for row in made['rows']:
    row['tasks'] = copy.deepcopy(tasks)
  made['choices'][0]['candidates'] = [{'method': 'laco', 'removed': [2, 3], 'loss': 1.5}]
  return made


def figures(value, path=()):
  """The paths of all numbers, except layer numbers and settings."""
  items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for key, v in items:
    if key in SETTINGS:
      continue
    if isinstance(v, int | float):
      yield *path, key
    yield from figures(v, (*path, key))


def spoiled(value, path, bad):
  value = copy.deepcopy(value)
  *parents, last = path
  holder = value
  for key in parents:
    holder = holder[key]
  if bad is MISSING:
    del holder[last]
  else:
    holder[last] = bad
  return value


@pytest.mark.parametrize('bad', BAD, ids=lambda bad: 'missing' if bad is MISSING else repr(bad))
def test_every_figure_of_a_report(tmp_path, bad):
  paths = list(figures(report()))
  assert len(paths) > 50 and ('params', 'dense') in paths and ('rows', 3, 'tasks', 'piqa', 'acc_stderr') in paths
  for path in paths:
    made = spoiled(report(), path, bad)
    for text in (table(made), markdown(made), model_card(made, CARD)):
      assert 'nan' not in text and 'inf' not in text and 'None' not in text and 'N/A' not in text, path
    verdict(made)
    write_json(tmp_path / 'report.json', made)
    read = json.loads(
      (tmp_path / 'report.json').read_text(), parse_constant=lambda name, path=path: pytest.fail(f'{path}: {name}')
    )
    assert table(read) == table(made), path


@pytest.mark.parametrize('bad', BAD, ids=lambda bad: 'missing' if bad is MISSING else repr(bad))
def test_a_plot_of_what_is_there(tmp_path, bad):
  made = report()
  for path in (('ppl', 'wiki', 'dense'), ('rows', 0, 'ppl', 'wiki')):
    plot_sweep(spoiled(made, path, bad), tmp_path / 'sweep.svg')
  for path in [path for path in figures(made) if 'wiki' in path and 'ppl' in path]:
    made = spoiled(made, path, bad)
  plot_sweep(made, tmp_path / 'none.svg')
  assert '<svg' in (tmp_path / 'none.svg').read_text()


@pytest.mark.parametrize('bad', BAD, ids=lambda bad: 'missing' if bad is MISSING else repr(bad))
def test_every_figure_of_the_other_commands(bad):
  tasks = report()['tasks']['dense']
  for path in figures(tasks):
    assert 'nan' not in evaluate.table(spoiled(tasks, path, bad))
  rows = [timing.figures([2.0], [1.0], 8, 6, new_tokens, absolute=True) | {'what': 'x'} for new_tokens in (0, 9)]
  result = {
    'rows': rows,
    'settings': {'dtype': 'float32', 'repeats': 5},
    'layers': {'dense': 8, 'pruned': 6},
    'device': 'x',
    'versions': {},
  }
  for path in figures(result):
    assert 'nan' not in speed.markdown(spoiled(result, path, bad)), path


def test_a_dash_stands_for_what_is_missing():
  tasks = {'piqa': {'acc': 0.7, 'acc_stderr': None, 'n': 1}, 'nli': {'acc': math.nan, 'acc_stderr': 0.1, 'n': 3}}
  rows = [{'method': 'given', 'recipe': 'none', 'removed': [2], 'ppl': {'wiki': None, 'news': 7.0}, 'tasks': {}}]
  made = make('none', rows=rows, tasks={'dense': tasks, 'pruned': {}})
  made['ppl']['wiki']['dense'] = math.inf
  assert table(made).splitlines()[2:] == [
    '| dense | 6 | — | 7.00 | 70.0 | — |',
    '| direct removal (exported) | 5 | — | 7.00 | — | — |',
  ]


def test_each_task_shows_its_own_figures():
  tasks = {
    'lambada': {'perplexity': 30.5, 'perplexity_stderr': 1.25, 'acc': 0.5, 'acc_stderr': 0.02, 'n': 100},
    'wiki': {'word_perplexity': 123456.0, 'word_perplexity_stderr': None, 'n': 3},
    'gsm': {'exact_match,strict': 0.25, 'exact_match_stderr,strict': 0.015, 'exact_match,loose': 0.5, 'n': 10},
    'group': {},
  }
  made = make('none', rows=make()['rows'][:1], ppl={}, tasks={'dense': tasks, 'pruned': {}})
  assert table(made).splitlines()[:3] == [
    '| model | layers | lambada, % | wiki word_perplexity | gsm exact_match (strict), % |',
    '| --- | ---: | ---: | ---: | ---: |',
    '| dense | 6 | 50.0 ± 2.0 | 1.2e+05 | 25.0 ± 1.5 |',
  ]
  assert evaluate.table(tasks).splitlines() == [
    '| task | questions | perplexity | acc, % | word_perplexity | exact_match (strict), % | exact_match (loose), % |',
    '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    '| lambada | 100 | 30.50 ± 1.25 | 50.00 ± 2.00 | — | — | — |',
    '| wiki | 3 | — | — | 1.2e+05 | — | — |',
    '| gsm | 10 | — | — | — | 25.00 ± 1.50 | 50.00 |',
    '| group | — | — | — | — | — | — |',
  ]


def test_a_rival_beats_an_export_without_a_figure():
  made = make()
  made['rows'][-1]['ppl']['wiki'] = None
  (line,) = verdict(made)
  assert line.endswith('"regularise, then prune": 21.00 against —.')


def test_large_models_and_long_runs_are_written_in_full():
  made = make(params={'dense': 70.6e9, 'pruned': 60.1e9}, seconds={'train': 123456.0}, peak_bytes=70 * 2**30)
  text = markdown(made)
  assert 'Parameters: 70600.0 M → 60100.0 M (14.9% fewer).' in text
  assert 'Seconds: train 123456.' in text and 'Peak memory of one: 70.00 GiB.' in text
