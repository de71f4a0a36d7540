"""report.md: what a run removed, and what that cost."""

import dataclasses
import functools
import math

from elder_jax.recipes import RECIPES
from elder_jax.recipes import label_of
from elder_jax.run import curve
from elder_jax.run import healing
from elder_jax.run.tables import figure
from elder_jax.run.tables import main_metric
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import metric_figure
from elder_jax.run.tables import millions
from elder_jax.run.tables import number
from elder_jax.run.tables import task_head

SCHEMA = 2


def table(report: dict) -> str:
  """Markdown: a row per model, perplexity on each corpus and the main metric of each task."""
  head, lines, text_columns = table_cells(report)
  return markdown_table(head, lines, text_columns)


def table_cells(report: dict) -> tuple[list[str], list[list[str]], int]:
  """(head, rows, number of columns that are text) of that table."""
  corpora, tasks = list(report['ppl']), tasks_of(report)
  methods = len({row['method'] for row in report['rows']}) > 1
  head = ['model', *(['layers chosen by'] if methods else []), 'layers', *(f'PPL {c}' for c in corpora)]
  head += [task_head(task, metric) for task, metric in tasks.items()]
  lines = []
  for model in models_of(report):
    figures = [figure(model.ppl.get(c)) for c in corpora]
    figures += [metric_figure(model.tasks.get(t, {}), metric, 1) for t, metric in tasks.items()]
    name = model.name + (' (exported)' if model.exported else '')
    lines.append([name, *([model.method] if methods else []), str(model.layers), *figures])
  return head, lines, 2 if methods else 1


def tasks_of(report: dict) -> dict[str, str]:
  """{task: its main metric}, of the tasks that have one."""
  return {task: metric for task, values in report['tasks']['dense'].items() if (metric := main_metric(values))}


@dataclasses.dataclass(frozen=True)
class Model:
  """A row of the table. row: that of the report; None: a model that the run compares with."""

  name: str
  method: str
  layers: int
  ppl: dict
  tasks: dict
  row: dict | None = None
  exported: bool = False


def models_of(report: dict) -> list[Model]:
  """The teacher if there is one, the dense model (of `heal` the model before healing), then the rows in their order."""
  ppl = {corpus: values.get('dense') for corpus, values in report['ppl'].items()}
  name = 'before' if report.get('heals') else 'dense'
  models = [Model(name, '', report['num_layers'], ppl, report['tasks']['dense'])]
  if teacher := report.get('teacher'):
    models.insert(0, Model('teacher', '', teacher['num_layers'], teacher['ppl'], teacher['tasks']))
  for row in sorted(report['rows'], key=functools.partial(_place, report)):
    name = label_of(row['recipe']) + (f', round {row["round"]}' if 'round' in row else '')
    left, exported = report['num_layers'] - len(row['removed']), row is report['rows'][-1]
    models.append(Model(name, row['method'], left, row['ppl'], row['tasks'], row, exported))
  return models


def reference_of(report: dict) -> Model:
  """The model that others are measured against: the teacher, else the dense one (of `heal` the one before healing)."""
  return models_of(report)[0]


def exported_of(report: dict) -> Model:
  """The row that is exported."""
  return next(model for model in models_of(report) if model.exported)


def _place(report: dict, row: dict) -> tuple[int, int, int]:
  """A row's place in the table: by depth, then by method with the exported one's first, then in the order of RECIPES."""
  methods = list(dict.fromkeys(r['method'] for r in [report['rows'][-1], *report['rows']]))
  recipes = [*RECIPES, row['recipe']]
  return len(row['removed']), methods.index(row['method']), recipes.index(row['recipe'])


def estimated_speed(report: dict) -> float:
  """Speed of generation over that of the dense model at batch 1, where reading the weights takes the time; or NaN."""
  read = report.get('read_per_token') or {}
  dense, pruned = number(read.get('dense')), number(read.get('pruned'))
  return dense / pruned if pruned > 0 else math.nan


def verdict(report: dict) -> list[str]:
  """A sentence for each corpus on which another row with as many layers is better than the exported one."""
  lines, exported = [], report['rows'][-1]
  rivals = [row for row in report['rows'] if len(row['removed']) == len(exported['removed'])]
  methods = len({row['method'] for row in rivals}) > 1

  def name(row: dict) -> str:
    return label_of(row['recipe']) + (f', layers chosen by {row["method"]}' if methods else '')

  def ppl_on(corpus: str, row: dict) -> float:
    value = number(row['ppl'].get(corpus))
    return math.inf if math.isnan(value) else value

  for corpus in report['ppl']:
    ppl = functools.partial(ppl_on, corpus)
    best = min(rivals, key=ppl)
    if ppl(best) < ppl(exported):
      lines.append(
        f'On {corpus}, "{name(best)}" is better than the exported "{name(exported)}": '
        f'{figure(ppl(best))} against {figure(ppl(exported))}.'
      )
  return lines


def markdown(report: dict) -> str:
  """report.md."""
  fewer = 1 - number(report['params'].get('pruned')) / number(report['params'].get('dense'))
  lines = [
    f'# {report["model"]}: {report["num_layers"]} → {len(report["kept"])} layers',
    '',
    f'Removed layers (0-based, numbered as in the dense model): {report["removed"]}. Kept: {report["kept"]}.',
    f'Parameters: {millions(report, "dense")} → {millions(report, "pruned")} ({figure(100 * fewer, 1)}% fewer).',
    '',
  ]
  if (speed := estimated_speed(report)) > 1:
    lines += [f'Estimated speed of generation at batch 1, by the weights read per token: {figure(speed)} × dense.', '']
  if report['ppl'] or report['tasks']['dense']:
    lines += [table(report), '']
  if report['ppl']:
    lines += _about_perplexity(report)
  lines += [*healing.table(report), *_about_series(report), *curve.table(report), *about_text(report)]
  lines += answers_section(report)
  for choice in report['choices']:
    lines += _about_choice(choice)
  if report['gates']:
    final = ', '.join(f'{l}: {figure(g, 3)}' for l, g in enumerate(report['gates'][-1]))
    lines += [f'Learned gates by layer: {final}.', '']
  if unverified := verification(report):
    lines += [unverified, '']
  seconds = ', '.join(f'{stage} {figure(s, 0, limit=1e9)}' for stage, s in report['seconds'].items())
  peak = number(report.get('peak_bytes')) / 2**30
  memory = '' if math.isnan(peak) else f' Peak memory of one: {figure(peak)} GiB.'
  versions = ', '.join(f'{k} {v}' for k, v in report['versions'].items())
  lines += [f'Seconds: {seconds}. Device: {report["device"]}.{memory}', f'Versions: {versions}.']
  return '\n'.join(lines) + '\n'


def _about_perplexity(report: dict) -> list[str]:
  lines = []
  if len({len(row['removed']) for row in report['rows']}) > 1:
    lines += ['![perplexity over layers](sweep.svg)', '']
  lines += [f'{line}\n' for line in verdict(report)]
  for corpus, about in report['corpora'].items():
    lines.append(
      f'- {corpus}: {about["source"]}, sha256 {about["sha256"][:16]}…, {about["windows"]} windows of '
      f'{about["window"]} tokens, BOS: {about["bos"]}.'
    )
  return [*lines, f'- Protocol: {next(iter(report["corpora"].values()))["protocol"]}.', '']


def answers_section(report: dict, most: int = 10) -> list[str]:
  """Lines of Markdown: what both models wrote after the first `most` prompts. Reports of earlier versions have none."""
  given = report.get('answers') or []
  if not given:
    return []

  def line(text: str | None) -> str:
    if text is None:
      return '—'
    return printable(text.strip().replace('\n', '↵'))

  lines = ['## Answers', '', 'The most probable continuation of each prompt. ↵ is a new line.', '', '```text']
  for answer in given[:most]:
    lines += [
      f'> {line(answer["prompt"])}',
      f'dense:  {line(answer["dense"])}',
      f'pruned: {line(answer["pruned"])}',
      '',
    ]
  lines[-1] = '```'
  more = [f'{len(given) - most} more are in report.json.', ''] if len(given) > most else []
  return [*lines, '', *more]


def printable(text: str, besides: str = '') -> str:
  """Characters that cannot be printed are escaped, but for those of `besides`: a broken model may write anything."""
  return ''.join(c if c.isprintable() or c in besides else ascii(c)[1:-1] for c in text)


def _about_series(report: dict) -> list[str]:
  """Lines of Markdown on several runs as one: the search for a depth, and means over seeds."""
  lines = []
  if report.get('search'):
    tried = '; '.join(f'{n}: {figure(100 * increase, 1)}%' for n, increase in report['search'])
    most = figure(100 * number(report['max_ppl_increase']), 1)
    lines += [f'Search for the most layers at up to {most}% more held-out perplexity before training: {tried}.', '']
  if cells := seeds_cells(report):
    lines += [markdown_table(*cells), '']
  return lines


def seeds_cells(report: dict) -> tuple[list[str], list[list[str]]] | None:
  """(head, rows) of the table of several seeds."""
  if not (seeds := report.get('seeds')):
    return None
  corpora = list(report['ppl'])
  head = [f'{len(seeds["seeds"])} seeds, mean ± standard deviation', 'layers', *(f'PPL {c}' for c in corpora)]
  rows = []
  for row in seeds['rows']:
    figures = [f'{figure(v["mean"])} ± {figure(v["deviation"])}' for v in (row['ppl'][c] for c in corpora)]
    name = f'{label_of(row["recipe"])}, layers chosen by {row["method"]}'
    rows.append([name, str(report['num_layers'] - row['removed']), *figures])
  return head, rows


def about_text(report: dict) -> list[str]:
  """Lines of Markdown: the sources of the training text, if there are several or one was read more than once."""
  sources = report.get('train_data') or []
  if len(sources) < 2 and not any(number(s['times']) > 1 for s in sources):
    return []
  return [markdown_table(*text_cells(report)), '']


def text_cells(report: dict) -> tuple[list[str], list[list[str]]]:
  """(head, rows) of the table of the training text's sources."""
  sources = report.get('train_data') or []
  tokens = report['tokens_per_step'] * report['steps']
  total = sum(s['rows'] for s in sources) or 1
  rows = [
    [
      s['name'],
      figure(s['weight'], 3),
      f'{round(tokens * s["rows"] / total):,}',
      f'{figure(100 * s["rows"] / total)}%',
      figure(s['times'], 1),
    ]
    for s in sources
  ]
  return ['training text', 'weight', 'tokens read', 'share', 'times'], rows


def _about_choice(choice: dict) -> list[str]:
  lines = []
  if choice.get('merges'):
    merged = '; '.join(f'{base} ← {", ".join(map(str, members))}' for base, *members in choice['merges'])
    lines += [f'Layers merged by {choice["method"]}, {choice["num_remove"]} fewer: {merged}.', '']
  if choice.get('candidates'):
    judged = '; '.join(map(_candidate, choice['candidates']))
    lines += [f'Candidates for removing {choice["num_remove"]} layers (held-out loss after absorb): {judged}.', '']
  if swaps := choice.get('swaps'):
    made = '; '.join(f'{out} in place of {back}, {figure(loss, 4)}' for back, out, loss in swaps)
    lines += [f'Swaps kept of {choice["tried"]} tried: layer removed in place of another, loss: {made}.', '']
  return lines


def _candidate(c: dict) -> str:
  again = '' if c.get('again') is None else f', judged again {figure(c["again"], 4)}'
  return f'{c["method"]} {sorted(c["removed"])}, {figure(c.get("loss"), 4)}{again}'


def verification(report: dict) -> str:
  """A warning if the export could not be checked in PyTorch; empty otherwise."""
  why = report.get('verify', {}).get('torch_error')
  return f'**Not verified in PyTorch**: {why}. Read back in JAX, the export equals the pruned model.' if why else ''
