"""curve.svg and sweep.svg: the charts that stand beside report.md."""

import pathlib

from elder_jax.recipes import label_of
from elder_jax.run import curve
from elder_jax.run import drawing

_HEIGHT = 200  # points of axes with what is around them


def plot_sweep(report: dict, path: pathlib.Path):
  """Writes `figure_of` a sweep's report as an SVG."""
  drawing.save_whole(figure_of(report), path)


def plot_curve(report: dict, path: pathlib.Path):
  """Writes curve.figure_of a report as an SVG."""
  drawing.save_whole(curve.figure_of(report), path)


def ways_of(report: dict) -> dict[tuple[str, str], list[dict]]:
  """{(method, recipe): its rows by depth}, the exported one first."""
  ways: dict[tuple[str, str], list[dict]] = {}
  for row in [report['rows'][-1], *report['rows'][:-1]]:
    ways.setdefault((row['method'], row['recipe']), []).append(row)
  return {way: sorted(rows, key=lambda row: -len(row['removed'])) for way, rows in ways.items()}


@drawing.style()
def figure_of(report: dict, titles: dict[str, str] | None = None):
  """Perplexity over the number of layers: axes for each corpus, a line for each method and recipe.

  Args:
    titles: {corpus: title, which may be empty}; None: all corpora, by their names.
  """
  ways = ways_of(report)
  titles = {corpus: f'Perplexity on {corpus}' for corpus in report['ppl']} if titles is None else titles
  several = len({method for method, _ in ways}) > 1
  names = [f'{method}: {label_of(recipe)}' if several else label_of(recipe) for method, recipe in ways]
  labels = [drawing.wrapped(name if i else f'{name} (exported)') for i, name in enumerate(names)]
  below = drawing.legend_height([*labels, 'dense']) + 40
  figure = drawing.new_figure(_HEIGHT * len(titles) + below)
  for i, (corpus, title) in enumerate(titles.items()):
    bottom, top = below + _HEIGHT * (len(titles) - 1 - i), _HEIGHT * i + (24 if title else 8)
    axes = drawing.new_axes(figure, 40, bottom, 10, top, title)
    dense, every = drawing.drawable(report['ppl'][corpus].get('dense')), []
    for n, (label, rows) in enumerate(zip(labels, ways.values())):
      layers = [report['num_layers'] - len(row['removed']) for row in rows]
      ppl = [drawing.drawable(row['ppl'].get(corpus)) for row in rows]
      every += ppl
      look = {'marker': 'o', 'markersize': 4, 'label': label}
      axes.plot([*layers, report['num_layers']], [*ppl, dense], **look, **drawing.line(n))
    axes.axhline(dense, color=drawing.DENSE, linestyle=(0, (2, 2)), linewidth=1.4, label='dense')
    drawing.log_or_linear(axes, [dense, *every])
    axes.set_xlabel('layers')
    axes.xaxis.get_major_locator().set_params(integer=True)
  drawing.legend(figure)
  return figure
