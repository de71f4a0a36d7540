"""A page that compares the exported models of several runs."""

from collections.abc import Sequence
import math
from xml.etree.ElementTree import Element

from elder_jax.recipes import label_of
from elder_jax.run import drawing
from elder_jax.run.page import charts
from elder_jax.run.page import sections
from elder_jax.run.page.charts import Bar
from elder_jax.run.page.charts import Chart
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import document
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import section
from elder_jax.run.page.elements import table
from elder_jax.run.page.layers import strip
from elder_jax.run.page.notices import ratios
from elder_jax.run.report import exported_of
from elder_jax.run.report import reference_of
from elder_jax.run.report import tasks_of
from elder_jax.run.tables import compact
from elder_jax.run.tables import figure
from elder_jax.run.tables import metric_figure
from elder_jax.run.tables import metric_values
from elder_jax.run.tables import task_head

_MEASURED = ('sha256', 'windows', 'window', 'bos', 'protocol')  # what must be equal for perplexities to compare


def html(runs: Sequence[Finished]) -> str:
  title = f'{len(runs)} runs'
  corpora = list(dict.fromkeys(corpus for run in runs for corpus in run.report['ppl']))
  drawn = [*_perplexity(runs, corpora), *_tasks(runs)]
  return document(
    title,
    element('header', None, element('h1', None, title), element('p', None, 'The exported models side by side.')),
    _notices(runs, corpora),
    section('Results', sections.grid(drawn) if drawn else None, _table(runs, corpora)),
    section('Layers removed', *(strip(run.report['num_layers'], run.report['removed'], run.name, '') for run in runs)),
  )


def comparable(runs: Sequence[Finished], corpus: str) -> bool:
  """Whether all runs that measured on this text measured on the same windows of it."""
  of_runs = [run.report['corpora'].get(corpus, {}) for run in runs if corpus in run.report['ppl']]
  return len({tuple(about.get(key) for key in _MEASURED) for about in of_runs}) == 1


def _notices(runs: Sequence[Finished], corpora: list[str]) -> Element | None:
  lines = [
    f'The runs measured {corpus} on different texts or windows: compare the ratios to dense, not the perplexities.'
    for corpus in corpora
    if not comparable(runs, corpus)
  ]
  if len(_references(runs)) > 1:
    lines.append('The runs have different dense models.')
  return sections.notice_box('Before you compare', lines)


def _references(runs: Sequence[Finished]) -> dict[tuple[str, str], Finished]:
  """{(what it is called, its model): a run that has it} of the models that are not pruned."""
  found = {}
  for run in runs:
    report = run.report
    model = (report.get('teacher') or {}).get('model') or report['model']
    found.setdefault((reference_of(report).name, model), run)
  return found


def _entries(runs: Sequence[Finished]):
  """(label, model, run, whether it is a reference): the references, then the exported models."""
  references = _references(runs)
  for (name, model), run in references.items():
    label = name if len(references) == 1 else f'{name}: {model}'
    yield label, reference_of(run.report), run, True
  for run in runs:
    yield run.name, exported_of(run.report), run, False


def _perplexity(runs: Sequence[Finished], corpora: list[str]) -> list[Chart]:
  """A chart for each corpus; of ratios to dense where perplexities are not comparable."""
  found = []
  for i, corpus in enumerate(corpora[: charts.MOST_CHARTS]):
    absolute, bars = comparable(runs, corpus), []
    for label, model, run, reference in _entries(runs):
      if absolute and corpus in model.ppl:
        bars.append(_bar(label, drawing.drawable(model.ppl[corpus]), figure(model.ppl[corpus]), reference))
      elif not absolute and (ratio := 1.0 if reference else ratios(run.report).get(corpus)) is not None:
        bars.append(_bar(label, ratio, f'{figure(ratio)} ×', reference))
    title = f'Perplexity on {corpus}' + ('' if absolute else ', × dense')
    found.append(charts.bar_chart(f'perplexity-{i + 1}-{corpus}', title, 'Lower is better.', bars, lower=True))
  return found


def _tasks(runs: Sequence[Finished]) -> list[Chart]:
  tasks = {task: metric for run in runs for task, metric in tasks_of(run.report).items()}
  found = []
  for i, (task, metric) in enumerate(list(tasks.items())[: charts.MOST_CHARTS]):
    bars = []
    for label, model, _, reference in _entries(runs):
      if values := model.tasks.get(task):
        value, error = metric_values(values, metric)
        bars.append(_bar(label, value, metric_figure(values, metric, 1), reference, error))
    found.append(charts.bar_chart(f'task-{i + 1}-{task}', task_head(task, metric), '± one standard error.', bars))
  return found


def _bar(label: str, value: float, text: str, reference: bool, error: float = math.nan) -> Bar:
  return Bar(label, value, text, drawing.DENSE if reference else drawing.EXPORTED, reference, error)


def _table(runs: Sequence[Finished], corpora: list[str]) -> Element:
  tasks = {task: metric for run in runs for task, metric in tasks_of(run.report).items()}
  head = ['run', 'recipe', 'layers', 'parameters', 'tokens', *(f'PPL {corpus}' for corpus in corpora)]
  head += [task_head(task, metric) for task, metric in tasks.items()]
  rows = []
  for label, model, run, reference in _entries(runs):
    report = run.report
    tokens = (report.get('steps') or 0) * (report.get('tokens_per_step') or 0)
    of_dense = {} if reference else ratios(report)
    cells = ['', str(model.layers), compact(report['params'].get('dense')), '']
    if not reference:
      cells = [label_of(report['recipe']), str(model.layers), compact(report['params'].get('pruned')), compact(tokens)]
    for corpus in corpora:
      ratio = f' ({figure(of_dense[corpus])} ×)' if corpus in of_dense else ''
      shown = comparable(runs, corpus) or not reference
      cells.append(figure(model.ppl.get(corpus) if shown else None) + ratio)
    cells += [metric_figure(model.tasks.get(task, {}), metric, 1) for task, metric in tasks.items()]
    rows.append([label, *cells])
  return table(head, rows, 2, 'the exported models')
