"""report.md: what a run removed, and what that cost."""

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
from elder_jax.run.tables import metric_head
from elder_jax.run.tables import millions
from elder_jax.run.tables import number

SCHEMA = 2


def table(report: dict) -> str:
  """Markdown: a row per model, perplexity on each corpus and the main metric of each task."""
  corpora, dense = list(report['ppl']), report['tasks']['dense']
  tasks = {task: metric for task, values in dense.items() if (metric := main_metric(values))}
  methods = len({row['method'] for row in report['rows']}) > 1
  head = ['model', *(['layers chosen by'] if methods else []), 'layers', *(f'PPL {c}' for c in corpora)]
  head += [f'{t}, %' if metric == 'acc' else f'{t} {metric_head(metric)}' for t, metric in tasks.items()]

  def cells(name: str, method: str, layers: int, ppl: dict, values: dict) -> list[str]:
    figures = [figure(ppl.get(c)) for c in corpora] + [metric_figure(values.get(t, {}), m, 1) for t, m in tasks.items()]
    return [name, *([method] if methods else []), str(layers), *figures]

  dense_ppl = {c: report['ppl'][c].get('dense') for c in corpora}
  lines = [cells('before' if report.get('heals') else 'dense', '', report['num_layers'], dense_ppl, dense)]
  if teacher := report.get('teacher'):
    lines.insert(0, cells('teacher', '', teacher['num_layers'], teacher['ppl'], teacher['tasks']))
  for row in sorted(report['rows'], key=functools.partial(_place, report)):
    name = label_of(row['recipe']) + (f', round {row["round"]}' if 'round' in row else '')
    name += ' (exported)' if row is report['rows'][-1] else ''
    left = report['num_layers'] - len(row['removed'])
    lines.append(cells(name, row['method'], left, row['ppl'], row['tasks']))
  return markdown_table(head, lines, 2 if methods else 1)


def _place(report: dict, row: dict) -> tuple[int, int, int]:
  """Of a row in the table: by depth, then by method, the exported one's first, then by the order of RECIPES."""
  methods = list(dict.fromkeys(r['method'] for r in [report['rows'][-1], *report['rows']]))
  recipes = [*RECIPES, row['recipe']]
  return len(row['removed']), methods.index(row['method']), recipes.index(row['recipe'])


def verdict(report: dict) -> list[str]:
  """One sentence per corpus on which another way to as few layers was better than the exported one."""
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
    f'Removed (0-based, numbers of the dense model): {report["removed"]}. Kept: {report["kept"]}.',
    f'Parameters: {millions(report, "dense")} → {millions(report, "pruned")} ({figure(100 * fewer, 1)}% fewer).',
    '',
  ]
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
    lines += [f'Gates at the end of stage 1: {final}.', '']
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
  """Lines of Markdown: what both models wrote after the same prompts, of the first `most`; earlier reports have none."""
  given = report.get('answers') or []
  if not given:
    return []

  def line(text: str | None) -> str:
    if text is None:
      return '—'
    text = text.strip().replace('\n', '↵')
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)  # a broken model writes anything

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


def _about_series(report: dict) -> list[str]:
  """Of several runs as one: the search for a depth, and means over seeds."""
  lines = []
  if report.get('search'):
    tried = '; '.join(f'{n}: {figure(100 * increase, 1)}%' for n, increase in report['search'])
    most = figure(100 * number(report['max_ppl_increase']), 1)
    lines += [f'Layers that may go for at most {most}% more held-out perplexity before training: {tried}.', '']
  if seeds := report.get('seeds'):
    corpora = list(report['ppl'])
    head = [f'{len(seeds["seeds"])} seeds, mean ± deviation', 'layers', *(f'PPL {c}' for c in corpora)]
    rows = []
    for row in seeds['rows']:
      figures = [f'{figure(v["mean"])} ± {figure(v["deviation"])}' for v in (row['ppl'][c] for c in corpora)]
      name = f'{label_of(row["recipe"])}, layers chosen by {row["method"]}'
      rows.append([name, str(report['num_layers'] - row['removed']), *figures])
    lines += [markdown_table(head, rows), '']
  return lines


def about_text(report: dict) -> list[str]:
  """Lines of Markdown: the sources of the training text, where there are several or one was read more than once."""
  sources = report.get('train_data') or []
  if len(sources) < 2 and not any(number(s['times']) > 1 for s in sources):
    return []
  tokens = report['tokens_per_step'] * report['steps']
  total = sum(s['rows'] for s in sources) or 1
  head = ['training text', 'weight', 'tokens read', 'share', 'times']
  lines = [
    [
      s['name'],
      figure(s['weight'], 3),
      f'{round(tokens * s["rows"] / total):,}',
      f'{figure(100 * s["rows"] / total)}%',
      figure(s['times'], 1),
    ]
    for s in sources
  ]
  return [markdown_table(head, lines), '']


def _about_choice(choice: dict) -> list[str]:
  lines = []
  if choice.get('merges'):
    merged = '; '.join(f'{base} ← {", ".join(map(str, members))}' for base, *members in choice['merges'])
    lines += [f'Layers merged by {choice["method"]}, {choice["num_remove"]} fewer: {merged}.', '']
  if choice.get('candidates'):
    judged = '; '.join(map(_candidate, choice['candidates']))
    lines += [f'Candidates for {choice["num_remove"]} layers (held-out loss after absorb): {judged}.', '']
  if swaps := choice.get('swaps'):
    made = '; '.join(f'{out} for {back}, {figure(loss, 4)}' for back, out, loss in swaps)
    lines += [f'Layers that went in place of others, of {choice["tried"]} swaps tried (loss): {made}.', '']
  return lines


def _candidate(c: dict) -> str:
  again = '' if c.get('again') is None else f', judged again {figure(c["again"], 4)}'
  return f'{c["method"]} {sorted(c["removed"])}, {figure(c.get("loss"), 4)}{again}'


def verification(report: dict) -> str:
  """A warning where the check of the export in PyTorch could not be made; empty otherwise."""
  why = report.get('verify', {}).get('torch_error')
  return f'**Not verified in PyTorch**: {why}. Read back in JAX it is the pruned model.' if why else ''
