"""How every chart of a run looks: one size, one style, few colours. Matplotlib is imported when the first one is drawn."""

from collections.abc import Generator
import contextlib
import math
import os
import pathlib
import textwrap
import warnings

from elder_jax.run.tables import number

WIDTH = 330  # points: on a phone the text of a chart keeps its size
INK, MUTED, GRID, PAPER = '#1b1f24', '#59636e', '#d1d9e0', '#ffffff'
DENSE, EXPORTED, OTHER, REMOVED = '#6e5d45', '#0b5cad', '#7d9cc0', '#b3400a'
_GREEN, _PURPLE, _BROWN = '#00735a', '#86378a', '#7a5c00'
# The names of these colours in style.css, which has others for the dark.
NAMES = {
  **{INK: 'ink', MUTED: 'muted', GRID: 'grid', PAPER: 'paper'},
  **{DENSE: 'dense', EXPORTED: 'exported', OTHER: 'other', REMOVED: 'removed'},
  **{_GREEN: 'green', _PURPLE: 'purple', _BROWN: 'brown'},
}
_COLOURS = (REMOVED, _GREEN, _PURPLE, _BROWN, MUTED)
_DASHES = ((0, (5, 1.5)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (9, 2)), (0, (3, 3)))
_STYLE = {
  'axes.edgecolor': MUTED,
  'axes.facecolor': 'none',
  'axes.grid': True,
  'axes.labelcolor': MUTED,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'figure.facecolor': PAPER,
  'font.size': 11,
  'grid.color': GRID,
  'grid.linewidth': 0.8,
  'legend.borderpad': 0,
  'legend.frameon': False,
  'legend.handlelength': 2.6,
  'legend.labelcolor': INK,
  'legend.labelspacing': 0.35,
  'svg.fonttype': 'none',  # letters, not their outlines: they can be read aloud, searched and copied
  'text.color': INK,
  'text.parse_math': False,  # a name may have a $
  'xtick.color': MUTED,
  'ytick.color': MUTED,
}


@contextlib.contextmanager
def style() -> Generator[None]:
  """Figures are made and written in this context."""
  import matplotlib

  with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of letters that matplotlib's font lacks; a browser has others
    yield


def new_figure(height: float):
  """A figure of WIDTH, height in points."""
  import matplotlib.figure

  return matplotlib.figure.Figure(figsize=(WIDTH / 72, height / 72))


def new_axes(figure, left: float, bottom: float, right: float, top: float, title: str = ''):
  """Axes with these margins, in points; title: stands above them."""
  width, height = (72 * inches for inches in figure.get_size_inches())
  axes = figure.add_axes(
    (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
  )
  axes.set_title(title, loc='left', x=(4 - left) / (width - left - right), fontsize=11, fontweight='bold')
  return axes


def wrapped(label: str, letters: int = 44) -> str:
  """A label in lines that fit WIDTH."""
  return '\n'.join(textwrap.wrap(label, letters, max_lines=3, placeholder=' …'))


def legend_height(labels: list[str]) -> float:
  """Points that `legend` takes."""
  return 15 * sum(label.count('\n') + 1 for label in labels) + 6


def legend(figure):
  """What the lines of the first axes are, at the bottom."""
  figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='lower left', fontsize=10)


def line(n: int) -> dict:
  """How the n-th line looks. The first is the exported row's; all differ in more than their colour."""
  if not n:
    return {'color': EXPORTED, 'linestyle': '-', 'linewidth': 2.4, 'zorder': 3}
  i = n - 1
  colour, dashes = _COLOURS[i % len(_COLOURS)], _DASHES[(i + i // len(_COLOURS)) % len(_DASHES)]
  return {'color': colour, 'linestyle': dashes, 'linewidth': 1.6}


def drawable(value) -> float:
  """The value, NaN if an axis cannot hold it."""
  return value if abs(value := number(value)) < 1e100 else math.nan


def log_or_linear(axes, values: list[float]):
  """A logarithmic y axis where the values lie far apart."""
  from matplotlib import ticker

  there = [value for value in values if not math.isnan(value)]
  if there and min(there) > 0 and max(there) > 3 * min(there):
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def save(figure, path_or_file, kind: str = 'svg', name: str = 'elder_jax'):
  """Writes a figure; the same figure gives the same bytes.

  Args:
    kind: svg or png.
    name: the ids in an SVG follow from it.
  """
  import matplotlib

  about = dict.fromkeys(('Creator', 'Date', 'Format', 'Type')) if kind == 'svg' else {'Software': None}
  with style(), matplotlib.rc_context({'svg.hashsalt': name}):
    figure.savefig(path_or_file, format=kind, metadata=about, dpi=72 if kind == 'svg' else 216)


def save_whole(figure, path: pathlib.Path, kind: str = 'svg'):
  """`save` under a temporary name, which is replaced when the file is whole."""
  temporary = path.with_name(f'{path.name}.partial')
  save(figure, temporary, kind)
  os.replace(temporary, path)
