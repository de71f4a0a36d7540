"""The figures that people look for first."""

from collections.abc import Iterable
from xml.etree.ElementTree import Element

from elder_jax.log import duration
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.notices import bytes_of
from elder_jax.run.page.notices import ratios
from elder_jax.run.report import estimated_speed
from elder_jax.run.report import exported_of
from elder_jax.run.report import reference_of
from elder_jax.run.tables import compact
from elder_jax.run.tables import figure
from elder_jax.run.tables import number
from elder_jax.run.tables import size

Tile = tuple[str, str, str, str]  # name, value, its unit in smaller letters, a line below


def tiles(run: Finished) -> Element:
  """A tile for each figure that the run has."""
  report, made = run.report, []
  found = [*_layers(report), *_parameters(report), *_disk(report), *_speed(run), *_perplexity(report), *_time(report)]
  for name, value, unit, more in found:
    shown = element('b', None, f'{value} ', element('small', None, unit) if unit else None)
    made.append(
      element(
        'div',
        {'class': 'tile'},
        element('dt', None, name),
        element('dd', None, shown, ' ', element('span', None, more)),
      )
    )
  return element('dl', {'class': 'tiles'}, *made)


def _layers(report: dict) -> Iterable[Tile]:
  before, after = report['num_layers'], len(report['kept'])
  if before != after:
    yield 'Layers', str(after), f'of {before}', f'{before - after} removed'
  elif teacher := (report.get('teacher') or {}).get('num_layers'):
    yield 'Layers', str(after), '', f'the teacher has {teacher}'
  else:
    yield 'Layers', str(after), '', 'none removed'


def _parameters(report: dict) -> Iterable[Tile]:
  dense, pruned = (number(report['params'].get(which)) for which in ('dense', 'pruned'))
  if pruned > 0:
    fewer = f'{figure(100 * (1 - pruned / dense), 1)}% fewer than {compact(dense)}' if dense > pruned else ''
    yield 'Parameters', compact(pruned), '', fewer


def _disk(report: dict) -> Iterable[Tile]:
  dense, pruned = (number(bytes_of(report).get(which)) for which in ('dense', 'pruned'))
  if pruned > 0:
    yield 'On disk', size(pruned), '', f'source: {size(dense)}'


def _speed(run: Finished) -> Iterable[Tile]:
  """Of generation at the smallest batch, the row after that of the prompt."""
  rows = [row for row in (run.speed or {}).get('rows', []) if number(row.get('ratio')) > 0]
  if rows:
    row = rows[min(1, len(rows) - 1)]
    yield 'Measured speed', f'{figure(row["ratio"])} ×', 'dense', str(row.get('what', ''))
  elif (ratio := estimated_speed(run.report)) > 1:
    yield 'Estimated speed', f'{figure(ratio)} ×', 'dense', 'generation at batch 1, by weights read per token'


def _perplexity(report: dict) -> Iterable[Tile]:
  reference, exported = reference_of(report), exported_of(report)
  for corpus, ratio in ratios(report).items():
    change = f'{figure(reference.ppl[corpus])} → {figure(exported.ppl[corpus])}'
    yield f'Perplexity, {corpus}', f'{figure(ratio)} ×', reference.name, change


def _time(report: dict) -> Iterable[Tile]:
  total = sum(seconds for value in report['seconds'].values() if (seconds := number(value)) > 0)
  if total:
    yield 'Time', duration(total), '', report['device'].split(',')[0]
