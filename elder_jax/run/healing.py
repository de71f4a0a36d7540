"""What healing gained, and how many tokens a point cost."""

from elder_jax.run.tables import figure
from elder_jax.run.tables import is_fraction
from elder_jax.run.tables import main_metric
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import number
from elder_jax.run.tables import task_head


def table(report: dict) -> list[str]:
  """Lines of Markdown."""
  head, rows = cells(report)
  return [markdown_table(head, rows), ''] if rows else []


def cells(report: dict) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of the table; no rows if the run did not heal. A point is one percent of the teacher's perplexity
  (without a teacher, of that before healing), or a percentage point of a task's correct answers."""
  head = ['', 'teacher', 'before', 'after', 'points gained', 'tokens per point']
  if not report.get('heals'):
    return head, []
  teacher, tokens = report.get('teacher') or {}, report['steps'] * report['tokens_per_step']
  rows = []
  for corpus, ppl in report['ppl'].items():
    before, after, of_teacher = (
      number(v) for v in (ppl['dense'], ppl['pruned'], (teacher.get('ppl') or {}).get(corpus))
    )
    points = 100 * (before - after) / (of_teacher if of_teacher == of_teacher else before)
    rows.append(_row(f'PPL {corpus}', of_teacher, before, after, points, tokens, 2))
  for task, before in report['tasks']['dense'].items():
    if (metric := main_metric(before)) and is_fraction(metric):
      of_all = [(teacher.get('tasks') or {}).get(task, {}), before, report['tasks']['pruned'].get(task, {})]
      values = [100 * number(of_one.get(metric)) for of_one in of_all]
      rows.append(_row(task_head(task, metric), *values, values[2] - values[1], tokens, 1))
  return head, rows


def _row(name: str, teacher: float, before: float, after: float, points: float, tokens: int, digits: int) -> list[str]:
  price = f'{tokens / points:,.0f}' if points > 0 and tokens else '—'
  return [name, *(figure(v, digits) for v in (teacher, before, after)), figure(points), price]
