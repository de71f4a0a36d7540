"""The plots of a report."""

import math
import os
import pathlib

from elder_jax.recipes import label_of
from elder_jax.run import curve
from elder_jax.run.tables import number


def plot_sweep(report: dict, path: pathlib.Path):
  """Writes `figure_of` a sweep's report as an SVG."""
  _write(figure_of(report), path)


def plot_curve(report: dict, path: pathlib.Path):
  """Writes curve.figure_of a report as an SVG."""
  _write(curve.figure_of(report), path)


def _write(drawing, path: pathlib.Path):
  temporary = path.with_name(f'{path.name}.partial')
  drawing.savefig(temporary, format='svg', metadata={'Date': None})
  os.replace(temporary, path)


def figure_of(report: dict):
  """Perplexity over the number of layers, axes for each corpus, a line for each way of choosing and recipe."""
  import matplotlib.figure  # here: it is slow to import, and an extra

  corpora = list(report['ppl'])
  figure = matplotlib.figure.Figure(figsize=(6 * len(corpora), 4.5), layout='constrained')
  ways: dict[tuple[str, str], list[dict]] = {}
  for row in report['rows']:
    ways.setdefault((row['method'], row['recipe']), []).append(row)

  def depth(row):
    return report['num_layers'] - len(row['removed'])

  for corpus, axes in zip(corpora, figure.subplots(1, len(corpora), squeeze=False)[0]):
    for (method, recipe), rows in sorted(ways.items()):
      rows = sorted(rows, key=depth)
      layers = [depth(row) for row in rows] + [report['num_layers']]
      values = [*(row['ppl'].get(corpus) for row in rows), report['ppl'][corpus].get('dense')]
      ppl = [value if (value := number(v)) < 1e100 else math.nan for v in values]  # an axis overflows beyond
      axes.plot(layers, ppl, marker='o', label=f'{method}: {label_of(recipe)}')
    axes.set(title=corpus, xlabel='layers', ylabel='perplexity', yscale='log')
    axes.legend()
  return figure
