"""The curve of the held-out loss: how many tokens one row needs to reach the final loss of another."""

import numpy as np
import pytest

from elder_jax.run import curve
from elder_jax.run.plot import plot_curve


def row(recipe: str, losses: list, removed=(1, 2), method: str = 'auto') -> dict:
  held_out = [[10 * i, 1000 * i, loss] for i, loss in enumerate(losses)]
  return {'recipe': recipe, 'method': method, 'removed': list(removed), 'held_out': held_out}


@pytest.fixture
def report() -> dict:
  rows = [row('prune_then_train', [5.0, 4.0, 3.5]), row('replace_linear_then_train', [3.8, 3.2, 2.5])]
  exported = row('absorb_then_train', [4.0, 3.0, 2.8])
  return {'rows': [*rows, {'recipe': 'none', 'removed': [1, 2]}, exported], 'held_out_loss': 2.0}


def test_tokens_to_a_loss():
  values = [[0, 0, 4.0], [10, 1000, 3.0], [20, 2000, None], [30, 3000, 2.0]]
  assert curve.tokens_to(values, 4.5) == 0
  assert curve.tokens_to(values, 3.5) == pytest.approx(500)
  assert curve.tokens_to(values, 2.5) == pytest.approx(2000)  # across a measurement that is missing
  assert curve.tokens_to(values, 1.9) is None


def test_the_table_shows_how_many_times_fewer_tokens(report):
  lines = {line.split('|')[1].strip(): line.split('|')[2:-1] for line in curve.table(report)[2].splitlines()}
  cells = {name: [cell.strip() for cell in of_name] for name, of_name in lines.items()}
  assert cells['dense'][0] == '2.0000'
  assert cells['prune, then train'] == ['5.0000', '3.5000', '2,000', '500', '4.0 ×']
  assert cells['replaced by a linear map, then train'][-2:] == ['not reached', '—']
  assert cells['absorb, then train'] == ['4.0000', '2.8000', '2,000', '', '']


def test_rows_of_other_depths_are_not_compared(report):
  report['rows'][0]['removed'] = [1]
  assert ' 500 ' not in '\n'.join(curve.table(report))


def test_the_plot_has_each_curve(report, tmp_path):
  axes = curve.figure_of(report).axes[0]
  assert [line.get_label() for line in axes.lines] == [
    'prune, then train',
    'replaced by a linear map, then train',
    'absorb, then train (exported)',
    'dense',
  ]
  np.testing.assert_array_equal(axes.lines[2].get_xydata(), [[0, 4.0], [1000, 3.0], [2000, 2.8]])
  plot_curve(report, tmp_path / 'curve.svg')
  assert (tmp_path / 'curve.svg').read_text().startswith('<?xml')


def test_an_older_report_has_no_curve():
  assert curve.table({'rows': [{'recipe': 'none', 'removed': []}]}) == []
