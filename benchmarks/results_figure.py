"""The figure of docs/results.md, from the rows of benchmarks/results.py: perplexity over layers kept, a line per recipe."""

import io
import statistics

from benchmarks.results_rows import CHOICE
from benchmarks.results_table import NEWS
from benchmarks.results_table import TEST
from benchmarks.results_table import by_seed

LAYERS = 30
DEPTHS = (4, 7, 10)  # layers removed
# Label -> (how its row is named at 7 layers, at 4 and 10 layers; its colour, legible on white and on black).
LINES = {
  'removed only': (f'untrained/{{n}} layers/{CHOICE}', '', '#8c8c8c'),
  'absorb, no training': (f'untrained/{{n}} layers/{CHOICE}, absorb', '', '#56b4e9'),
  'regularise, then prune (ELDeR)': ('final/regularize', 'regularize', '#cc79a7'),
  'ReplaceMe, then train': ('final/replace_linear_then_train', 'replace_linear_then_train', '#e69f00'),
  'prune, then train': ('final/prune_then_train', 'prune_then_train', '#009e73'),
  'absorb, then train': ('final/absorb_then_train', 'absorb_then_train', '#d55e00'),
}
# Colours that change with the reader's scheme, each a placeholder in matplotlib's drawing.
INK, PAPER, GRID = '#010203', '#040506', '#070809'
STYLE = """<style>
svg { --ink: #24292f; --paper: #ffffff; --grid: #d8dee4 }
@media (prefers-color-scheme: dark) { svg { --ink: #d5dae1; --paper: #1e2129; --grid: #3b414d } }
</style>
"""


def lines(found: dict[str, dict]) -> dict[str, dict[str, dict[int, float]]]:
  """corpus -> label -> layers kept -> perplexity, the mean over seeds."""
  groups = by_seed(found)

  def mean(name: str, corpus: str) -> float:
    return statistics.mean(row['ppl'][corpus] for row in groups[name])

  def name_at(at_seven: str, other: str, n: int) -> str:
    return at_seven.format(n=n) if not other or n == 7 else f'other depths/{n} layers, {other}'

  return {
    corpus: {'dense': {LAYERS: mean('dense', corpus)}}
    | {
      label: {LAYERS - n: mean(name_at(at_seven, other, n), corpus) for n in DEPTHS}
      for label, (at_seven, other, _) in LINES.items()
    }
    for corpus in (TEST, NEWS)
  }


def described(found: dict[str, dict]) -> str:
  """The figures drawn, in words; they stand in the file, where a test compares them with the rows."""
  return '; '.join(
    f'{corpus}, {label}: ' + ', '.join(f'{kept} layers {ppl:.2f}' for kept, ppl in points.items())
    for corpus, of in lines(found).items()
    for label, points in of.items()
  )


def svg(found: dict[str, dict]) -> str:
  """The drawing; it follows the reader's light or dark scheme."""
  import matplotlib
  import matplotlib.figure

  style = {'svg.fonttype': 'none', 'svg.hashsalt': 'results', 'font.size': 10, 'font.family': 'sans-serif'}
  style |= dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'), INK)
  style |= {'figure.facecolor': PAPER, 'axes.facecolor': PAPER, 'grid.color': GRID}
  with matplotlib.rc_context(style):
    figure = matplotlib.figure.Figure(figsize=(8.8, 3.5), layout='constrained')
    for axes, (corpus, of) in zip(figure.subplots(1, 2), lines(found).items()):
      _draw(axes, corpus, of)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False)
    out = io.StringIO()
    about = {'Date': None, 'Creator': None, 'Title': 'Perplexity over layers kept', 'Description': described(found)}
    figure.savefig(out, format='svg', metadata=about)
  text = out.getvalue()
  for placeholder, name in ((INK, 'ink'), (PAPER, 'paper'), (GRID, 'grid')):
    text = text.replace(placeholder, f'var(--{name})')
  return text.replace('<defs>', STYLE + '<defs>', 1)


def _draw(axes, corpus: str, of: dict[str, dict[int, float]]):
  dense = of['dense'][LAYERS]
  axes.axhline(dense, color=INK, linestyle=':', label='dense')
  for label, (*_, colour) in LINES.items():
    bold = label == 'absorb, then train'
    axes.plot(
      list(of[label]), list(of[label].values()), marker='o', color=colour, label=label, linewidth=2.5 if bold else 1.5
    )
  most = max(ppl for points in of.values() for ppl in points.values())
  ticks = [tick for tick in (25, 50, 100, 200, 400, 800) if dense / 1.3 < tick < 1.1 * most]
  axes.set(title=corpus, xlabel='layers kept, of 30', ylabel='perplexity', yscale='log', xticks=[20, 23, 26])
  axes.set_yticks(ticks, [str(tick) for tick in ticks])
  axes.set_yticks([], minor=True)
  axes.invert_xaxis()
  axes.grid(alpha=0.8)
