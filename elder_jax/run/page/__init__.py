"""report.html: what people look at after a run, one file that loads nothing; with --png its charts as pictures.

data.py reads the run, elements.py makes HTML, charts.py draws. Each other file is a part of the page, compare.py a page of
several runs.
"""

from collections.abc import Sequence
import pathlib

from elder_jax.log import write_whole
from elder_jax.run import drawing
from elder_jax.run.page import charts
from elder_jax.run.page import compare
from elder_jax.run.page import sections
from elder_jax.run.page.data import Finished
from elder_jax.run.page.details import details
from elder_jax.run.page.elements import document
from elder_jax.run.page.layers import layers
from elder_jax.run.page.tiles import tiles
from elder_jax.run.page.usage import usage

NAME = 'report.html'
_PARTS = (
  sections.headline,
  tiles,
  sections.notices,
  sections.results,
  sections.answers,
  layers,
  sections.training,
  sections.gates,
  usage,
  details,
)


def html(run: Finished) -> str:
  """The page of a run."""
  return document(f'{sections.name_of(run.report)}, {len(run.report["kept"])} layers', *(part(run) for part in _PARTS))


def write(run: Finished, path: pathlib.Path):
  """Writes the page of a run."""
  write_whole(path, html(run))


def write_comparison(runs: Sequence[Finished], path: pathlib.Path):
  """Writes the page of several runs side by side."""
  write_whole(path, compare.html(runs))


def write_pictures(run: Finished, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the charts of a run as PNG; their files."""
  found = [*charts.perplexity(run), *charts.tasks(run), *charts.depths(run), *charts.losses(run), *charts.gates(run)]
  found += filter(None, [charts.strips(run)])
  paths = [folder / f'{chart.name}.png' for chart in found]
  for chart, path in zip(found, paths):
    drawing.save_whole(chart.draw(chart.title), path, 'png')
  return paths
