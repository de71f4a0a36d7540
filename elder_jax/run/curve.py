"""The held-out loss of each row over the tokens that it was trained on."""

from collections.abc import Sequence
import math

from elder_jax.recipes import label_of
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import number

Curve = Sequence[Sequence[float]]  # [step, tokens, loss in nats], by step


def curves_of(report: dict) -> list[dict]:
  """The rows that were trained and measured while they were."""
  return [row for row in report['rows'] if row.get('held_out')]


def tokens_to(curve: Curve, loss: float) -> float | None:
  """Tokens at which a curve first is at or below a loss, on a line between two measurements. None: never."""
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


def name_of(report: dict, row: dict) -> str:
  """How the curve of a row is called."""
  rows = curves_of(report)
  more = [row['method']] if len({r['method'] for r in rows}) > 1 else []
  more += [f'{len(row["removed"])} layers removed'] if len({len(r['removed']) for r in rows}) > 1 else []
  return ', '.join([label_of(row['recipe']), *more])


def table(report: dict) -> list[str]:
  """Lines of Markdown: held-out losses before and after, and the tokens that the exported row needs for each one's."""
  rows = curves_of(report)
  if not rows:
    return []
  exported = report['rows'][-1]
  head = [
    'held-out loss, nats a token',
    'before training',
    'after',
    'tokens',
    'the exported one has that after',
    'ratio',
  ]
  lines = [[name, figure(loss, 4), '', '', '', ''] for name, loss in _lines_of_reference(report)]
  for row in rows:
    curve = row['held_out']
    tokens, last = curve[-1][1], number(curve[-1][2])
    cells = [name_of(report, row), figure(curve[0][2], 4), figure(last, 4), f'{tokens:,}']
    lines.append([*cells, *_needed(exported, row, tokens, last)])
  return ['![held-out loss over tokens](curve.svg)', '', markdown_table(head, lines), '']


def _lines_of_reference(report: dict) -> list[tuple[str, float]]:
  """(name, held-out loss) of models that are not trained."""
  found = [('before' if report.get('heals') else 'dense', report.get('held_out_loss'))]
  found.append(('teacher', (report.get('teacher') or {}).get('held_out_loss')))
  return [(name, loss) for name, loss in found if loss]


def _needed(exported: dict, row: dict, tokens: int, loss: float) -> list[str]:
  """[tokens, ratio] of the exported row for the loss that another one has at its end."""
  if row is exported or not exported.get('held_out') or len(exported['removed']) != len(row['removed']):
    return ['', '']
  needed = tokens_to(exported['held_out'], loss)
  if needed is None:
    return ['not reached', '—']
  return [f'{needed:,.0f}', f'{tokens / needed:.1f} ×' if needed else 'no training']


def figure_of(report: dict):
  """Held-out loss over tokens, a line for each row that trained; the dense model's as a dashed one."""
  import matplotlib.figure  # here: it is slow to import, and an extra

  drawing = matplotlib.figure.Figure(figsize=(7, 4.5), layout='constrained')
  axes = drawing.subplots()
  for row in curves_of(report):
    tokens, losses = zip(*[(entry[1], number(entry[2])) for entry in row['held_out']])
    axes.plot(tokens, losses, marker='.', label=name_of(report, row))
  for name, loss in _lines_of_reference(report):
    axes.axhline(number(loss), linestyle='--', color='black' if name != 'before' else 'gray', label=name)
  axes.set(xlabel='tokens trained on', ylabel='held-out loss, nats a token')
  axes.legend()
  return drawing
