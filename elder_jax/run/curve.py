"""The held-out loss of each row over the tokens that it was trained on."""

from collections.abc import Sequence
import math

from elder_jax.recipes import label_of
from elder_jax.run import drawing
from elder_jax.run.tables import compact
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import number

Curve = Sequence[Sequence[float]]  # [step, tokens, loss in nats], by step


def curves_of(report: dict) -> list[dict]:
  """The rows whose held-out loss was measured during training."""
  return [row for row in report['rows'] if row.get('held_out')]


def tokens_to(curve: Curve, loss: float) -> float | None:
  """Tokens at which a curve first reaches a loss, interpolated between two measurements. None: never."""
  before = None
  for _, tokens, value in curve:
    value = number(value)
    if value <= loss:
      if before is None or before[1] == value:
        return float(tokens)
      fraction = (before[1] - loss) / (before[1] - value)
      return before[0] + fraction * (tokens - before[0])
    if not math.isnan(value):
      before = tokens, value
  return None


def name_of(rows: list[dict], row: dict) -> str:
  """The name of a row's curve among those of `rows`."""
  more = [row['method']] if len({r['method'] for r in rows}) > 1 else []
  more += [f'{len(row["removed"])} layers removed'] if len({len(r['removed']) for r in rows}) > 1 else []
  more += [f'round {row["round"]}'] if 'round' in row else []
  return ', '.join([label_of(row['recipe']), *more])


def table(report: dict) -> list[str]:
  """Lines of Markdown: held-out losses before and after, and the tokens that the exported row needs to reach each."""
  rows = curves_of(report)
  if not rows:
    return []
  head, lines = figures(report)
  return ['![held-out loss over tokens](curve.svg)', '', markdown_table(head, lines), '']


def figures(report: dict) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of that table."""
  rows, exported = curves_of(report), report['rows'][-1]
  head = [
    'held-out loss, nats per token',
    'before training',
    'after',
    'tokens',
    'the exported row reaches it after',
    'ratio',
  ]
  lines = [[name, figure(loss, 4), '', '', '', ''] for name, loss in references(report)]
  for row in rows:
    curve = row['held_out']
    tokens, last = curve[-1][1], number(curve[-1][2])
    cells = [name_of(rows, row), figure(curve[0][2], 4), figure(last, 4), f'{tokens:,}']
    lines.append([*cells, *_needed(exported, row, tokens, last)])
  return head, lines


def references(report: dict) -> list[tuple[str, float]]:
  """(name, held-out loss) of the models that are not trained."""
  found = [('before' if report.get('heals') else 'dense', report.get('held_out_loss'))]
  found.append(('teacher', (report.get('teacher') or {}).get('held_out_loss')))
  return [(name, loss) for name, loss in found if loss]


def _needed(exported: dict, row: dict, tokens: int, loss: float) -> list[str]:
  """[tokens, ratio] at which the exported row reaches the final loss of another row."""
  if row is exported or not exported.get('held_out') or len(exported['removed']) != len(row['removed']):
    return ['', '']
  needed = tokens_to(exported['held_out'], loss)
  if needed is None:
    return ['not reached', '—']
  return [f'{needed:,.0f}', f'{tokens / needed:.1f} ×' if needed else 'no training']


def figure_of(report: dict, title: str = 'Held-out loss, nats per token'):
  """Held-out loss over tokens: a line for each trained row, a dotted one for the dense model."""
  rows = curves_of(report)
  points = [(name_of(rows, row), [entry[1:] for entry in row['held_out']], row is report['rows'][-1]) for row in rows]
  return lines_figure(points, references(report), title, marker='.')


@drawing.style()
def lines_figure(curves: list[tuple], references: list[tuple[str, float]], title: str, marker: str = ''):
  """Losses over tokens.

  Args:
    curves: (name, [(tokens, loss)], whether it is the exported row's).
    references: (name, loss) of horizontal lines.
    title: empty for a figure without one.
  """
  from matplotlib import ticker

  labels = [drawing.wrapped(f'{name} (exported)' if exported else name) for name, _, exported in curves]
  below, above = drawing.legend_height([*labels, *(name for name, _ in references)]) + 42, 24 if title else 8
  drawn = drawing.new_figure(below + 170 + above)
  axes, others = drawing.new_axes(drawn, 36, below, 10, above, title), 0
  for label, (_, points, exported) in zip(labels, curves):
    others += not exported
    tokens, losses = zip(*((entry[0], drawing.drawable(entry[1])) for entry in points))
    axes.plot(tokens, losses, marker=marker, label=label, **drawing.line(0 if exported else others))
  for name, loss in references:
    colour = drawing.MUTED if name == 'before' else drawing.DENSE
    axes.axhline(drawing.drawable(loss), linestyle=(0, (2, 2)), linewidth=1.4, color=colour, label=name)
  axes.set_xlabel('tokens trained on')
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
  drawing.legend(drawn)
  return drawn
