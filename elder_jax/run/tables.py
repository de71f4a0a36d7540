"""Figures and tables for people. A figure that is missing, NaN or infinite is shown as a dash."""

from collections.abc import Iterable
import math


def number(value) -> float:
  """The value, or NaN if it is not a finite number."""
  return value if isinstance(value, int | float) and math.isfinite(value) else math.nan


def figure(value, digits: int = 2, limit: float = 1e4) -> str:
  """With `digits` decimals; from `limit` on in the form 1.2e+05."""
  value = number(value)
  if math.isnan(value):
    return '—'
  return f'{value:.{digits}f}' if abs(value) < limit else f'{value:.2g}'


def compact(value) -> str:
  """A count in three digits: 16.4k, 512k, 1.5M, 6.74B."""
  value = number(value)
  if math.isnan(value):
    return '—'
  for unit, name in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if abs(value) >= 0.9995 * unit:
      return f'{value / unit:.3g}{name}' if abs(value) < 999.5 * unit else f'{value / unit:,.0f}{name}'
  return f'{value:.3g}'


def size(count) -> str:
  """Bytes in three digits: 162 kB, 423 MB, 13.5 GB."""
  value = number(count)
  if math.isnan(value):
    return '—'
  unit, name = next(((u, n) for u, n in ((1e9, 'GB'), (1e6, 'MB')) if value >= 0.9995 * u), (1e3, 'kB'))
  return f'{value / unit:.3g} {name}' if value < 999.5 * unit else f'{value / unit:,.0f} {name}'


def ranges(layers: Iterable[int]) -> str:
  """Layer numbers with contiguous blocks as ranges: 3, 12–18."""
  blocks: list[list[int]] = []
  for layer in sorted(layers):
    if blocks and layer == blocks[-1][1] + 1:
      blocks[-1][1] = layer
    else:
      blocks.append([layer, layer])
  return ', '.join(str(first) if first == last else f'{first}–{last}' for first, last in blocks)


def millions(report: dict, which: str) -> str:
  return f'{figure(number(report["params"].get(which)) / 1e6, 1, limit=1e9)} M'


def task_metrics(values: dict) -> list[str]:
  """The metrics of a task, without their standard errors; 'exact_match,strict' is exact_match by the filter strict."""
  return [metric for metric in values if metric != 'n' and not metric.partition(',')[0].endswith('_stderr')]


def main_metric(values: dict) -> str:
  """The metric that a table of several tasks shows; empty if the task has none.

  It is the accuracy; of generated text exact_match by its first filter (gsm8k: strict-match); otherwise the first one.
  """
  metrics = task_metrics(values)
  for wanted in ('acc', 'exact_match'):
    if found := next((metric for metric in metrics if metric.partition(',')[0] == wanted), ''):
      return found
  return metrics[0] if metrics else ''


def is_fraction(metric: str) -> bool:
  """Whether a metric is a fraction of correct answers, which is shown in percent."""
  name = metric.partition(',')[0]
  return name.startswith(('acc', 'exact_match', 'pass@')) or name in ('em', 'f1')


def metric_head(metric: str) -> str:
  name, _, answers = metric.partition(',')
  return name + (f' ({answers})' if answers else '') + (', %' if is_fraction(metric) else '')


def task_head(task: str, metric: str) -> str:
  """The head of a task's column."""
  return f'{task}, %' if metric == 'acc' else f'{task} {metric_head(metric)}'


def metric_values(values: dict, metric: str) -> tuple[float, float]:
  """(value, standard error), each NaN if missing; a fraction in percent."""
  name, comma, answers = metric.partition(',')
  scale = 100 if is_fraction(metric) else 1
  return scale * number(values.get(metric)), scale * number(values.get(f'{name}_stderr{comma}{answers}'))


def metric_figure(values: dict, metric: str, digits: int = 2) -> str:
  """value ± standard error, as far as they are known; fractions in percent with `digits` decimals, others with two."""
  value, stderr = metric_values(values, metric)
  digits = digits if is_fraction(metric) else 2
  return figure(value, digits) + ('' if math.isnan(value + stderr) else f' ± {figure(stderr, digits)}')


def markdown_table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
  """A Markdown table; the first `text_columns` are text, the others figures."""
  align = ['---'] * text_columns + ['---:'] * (len(head) - text_columns)
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, align, *rows])


def text_table(rows: list[list[str]]) -> str:
  """Columns for a terminal, the first one text, the others figures."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ([c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
  return '\n'.join('  '.join(cells) for cells in lines)
