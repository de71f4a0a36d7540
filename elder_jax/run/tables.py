"""Figures and tables as people read them. A figure may be missing, NaN or infinite: it is shown as a dash."""

import math


def number(value) -> float:
  """The value, or NaN for what is no finite number."""
  return value if isinstance(value, int | float) and math.isfinite(value) else math.nan


def figure(value, digits: int = 2, limit: float = 1e4) -> str:
  """With `digits` after the point; from `limit` on as in 1.2e+05."""
  value = number(value)
  if math.isnan(value):
    return '—'
  return f'{value:.{digits}f}' if abs(value) < limit else f'{value:.2g}'


def millions(report: dict, which: str) -> str:
  return f'{figure(number(report["params"].get(which)) / 1e6, 1, limit=1e9)} M'


def task_metrics(values: dict) -> list[str]:
  """The metrics of a task, without their standard errors; 'exact_match,strict' is exact_match by the filter strict."""
  return [metric for metric in values if metric != 'n' and not metric.partition(',')[0].endswith('_stderr')]


def main_metric(values: dict) -> str:
  """The metric that stands for a task in a table of several; empty where it has none.

  Accuracy, of a text that is generated exact_match by its first filter (gsm8k: strict-match), else the first.
  """
  metrics = task_metrics(values)
  for wanted in ('acc', 'exact_match'):
    if found := next((metric for metric in metrics if metric.partition(',')[0] == wanted), ''):
      return found
  return metrics[0] if metrics else ''


def is_fraction(metric: str) -> bool:
  """Whether a metric is a fraction of right answers, which is shown in percent."""
  name = metric.partition(',')[0]
  return name.startswith(('acc', 'exact_match', 'pass@')) or name in ('em', 'f1')


def metric_head(metric: str) -> str:
  name, _, answers = metric.partition(',')
  return name + (f' ({answers})' if answers else '') + (', %' if is_fraction(metric) else '')


def metric_figure(values: dict, metric: str, digits: int = 2) -> str:
  """value ± standard error, as far as there are such; fractions in percent with `digits`, others with two."""
  name, comma, answers = metric.partition(',')
  scale, digits = (100, digits) if is_fraction(metric) else (1, 2)
  value, stderr = (scale * number(values.get(key)) for key in (metric, f'{name}_stderr{comma}{answers}'))
  return figure(value, digits) + ('' if math.isnan(value + stderr) else f' ± {figure(stderr, digits)}')


def markdown_table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
  """A Markdown table; the first `text_columns` are text, the others figures."""
  align = ['---'] * text_columns + ['---:'] * (len(head) - text_columns)
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [head, align, *rows])


def text_table(rows: list[list[str]]) -> str:
  """Columns side by side for a terminal, the first one text, the others figures."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ([c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
  return '\n'.join('  '.join(cells) for cells in lines)
