"""The parts of a page that show what a run measured. A part without data is None."""

import pathlib
from xml.etree.ElementTree import Element

from elder_jax import extras
from elder_jax.recipes import label_of
from elder_jax.run import healing
from elder_jax.run.page import charts
from elder_jax.run.page.charts import Chart
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import folded
from elder_jax.run.page.elements import section
from elder_jax.run.page.elements import svg
from elder_jax.run.page.elements import table
from elder_jax.run.page.notices import warnings
from elder_jax.run.report import seeds_cells
from elder_jax.run.report import table_cells
from elder_jax.run.report import text_cells
from elder_jax.run.tables import ranges

MOST_ANSWERS, MOST_LETTERS = 20, 2000  # on a page
NO_CHARTS = "This page has tables in place of charts: pip install 'elder_jax[report]', then run elder_jax report."


def name_of(report: dict) -> str:
  """The model without the folder or the owner."""
  return pathlib.PurePath(report['model']).name or report['model']


def headline(run: Finished) -> Element:
  report, recipe = run.report, f'Recipe: {label_of(run.report["recipe"])}.'
  before, after = report['num_layers'], len(report['kept'])
  if not report['removed']:
    title, about = f'{name_of(report)}: {after} layers', recipe
  else:
    method = report.get('method', 'given')
    chosen = '' if method == 'given' else f', chosen by {method}'
    title = f'{name_of(report)}: {before} → {after} layers'
    about = f'Removed: layers {ranges(report["removed"])}{chosen}. {recipe}'
  return element('header', None, element('h1', None, title), element('p', None, about))


def notices(run: Finished) -> Element | None:
  charts_missing = [] if extras.is_installed('matplotlib') else [NO_CHARTS]
  return notice_box('Before you use it', [*warnings(run.report), *charts_missing])


def notice_box(title: str, lines: list[str]) -> Element | None:
  if not lines:
    return None
  items = [element('li', None, line) for line in lines]
  return element('div', {'class': 'notices', 'role': 'note'}, element('h2', None, title), element('ul', None, *items))


# ---- charts ----


def results(run: Finished) -> Element | None:
  """Perplexity and tasks of each row, depths, and the table of all rows."""
  grids = [grid(found) for found in (charts.perplexity(run), charts.tasks(run), charts.depths(run)) if found]
  if not grids:
    return None
  head, rows, text_columns = table_cells(run.report)
  parts = [folded('All rows', table(head, rows, text_columns, 'all rows'))]
  if cells := seeds_cells(run.report):
    parts.append(table(*cells))
  head, rows = healing.cells(run.report)
  if rows:
    parts.append(folded('What healing gained', table(head, rows, name='what healing gained')))
  return section('Results', *grids, *parts)


def training(run: Finished) -> Element | None:
  found, report = charts.losses(run), run.report
  texts = text_cells(report) if report.get('train_data') and report.get('steps') else None
  if not found and not texts:
    return None
  return section('Training', grid(found) if found else None, folded('Training text', table(*texts)) if texts else None)


def gates(run: Finished) -> Element | None:
  found = charts.gates(run)
  return section('Gates', grid(found)) if found else None


def grid(found: list[Chart]) -> Element:
  return element('div', {'class': 'charts'}, *map(_chart, found))


def _chart(of: Chart) -> Element:
  """The picture, a sentence, and the figures as a table; without matplotlib the table alone."""
  figures = table(of.head, of.rows, name=of.title)
  if extras.is_installed('matplotlib'):
    picture = svg(of.draw(''), of.name, f'Chart: {of.title}. The figures are in the table below.')
    figures = folded('Figures', figures)
  else:
    picture = None
  caption = element('figcaption', None, of.about)
  return element('figure', None, element('h3', None, of.title), picture, caption, figures)


# ---- answers ----


def answers(run: Finished) -> Element | None:
  """What both models wrote after the same prompts."""
  given = run.report.get('answers') or []
  if not given:
    return None
  names = ('before', 'healed') if run.report.get('heals') else ('dense', 'pruned')
  about = 'The most probable continuation of each prompt.'
  if len(given) > MOST_ANSWERS:
    about += f' {len(given) - MOST_ANSWERS} more are in report.json.'
  parts = [_answer(answer, names) for answer in given[:MOST_ANSWERS]]
  return section('The same prompts', element('p', {'class': 'about'}, about), *parts)


def _answer(answer: dict, names: tuple[str, str]) -> Element:
  both = [
    element('div', {'class': key}, element('h4', None, name), element('p', {'class': 'text'}, _short(answer.get(key))))
    for key, name in zip(('dense', 'pruned'), names)
  ]
  prompt = element('h3', {'class': 'text'}, _short(answer['prompt']))
  return element('article', None, prompt, element('div', {'class': 'pair'}, *both))


def _short(text: str | None) -> str:
  if text is None:
    return '—'
  text = text.strip()
  return text if len(text) <= MOST_LETTERS else f'{text[:MOST_LETTERS]}…'
