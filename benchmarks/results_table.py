"""The tables of docs/results.md and docs/results/ from the rows of benchmarks/results.py."""

import collections
import json
import pathlib
import statistics

import numpy as np

from benchmarks.results_rows import BEST_LR
from benchmarks.results_rows import BUDGET
from benchmarks.results_rows import CHOICE
from benchmarks.results_rows import GEMMA
from benchmarks.results_rows import GEMMA_CHOICE
from benchmarks.results_rows import GEMMA_LR
from benchmarks.results_rows import PASS
from benchmarks.results_rows import PASS_BUDGET
from benchmarks.results_rows import rows as rows_to_run
from elder_jax.run.tables import markdown_table

ROWS = pathlib.Path(__file__).parent / 'results.jsonl'
TEST, NEWS = 'WikiText-2 test', 'news'
# Heading of a budget -> (prefix of its rows, its settings).
BUDGETS = {'One pass': (f'{PASS}/', PASS_BUDGET), 'Small budget': ('', BUDGET)}
CHOSEN_BY = ('search', 'ideas')  # sections of rows by which something was chosen
_SEARCH = f'{PASS}/search'
# Row of docs/results.md -> (row of the small budget, row of one pass over the text).
SMOLLM2 = {
  'dense': ('dense', f'{PASS}/final/dense'),
  'removed only': (f'untrained/7 layers/{CHOICE}', f'{PASS}/untrained/7 layers/auto'),
  'absorb, no training': (f'untrained/7 layers/{CHOICE}, absorb', ''),
  'regularise, then prune (ELDeR)': ('final/regularize', f'{_SEARCH}/regularize, lr 0.0001'),
  'prune, then train': ('final/prune_then_train', f'{_SEARCH}/prune_then_train, lr 0.0001'),
  'ReplaceMe, then train': (
    'final/replace_linear_then_train, lr 0.0003',
    f'{_SEARCH}/replace_linear_then_train, lr 0.0001',
  ),
  '**absorb, then train**': ('final/absorb_then_train', f'{_SEARCH}/absorb_then_train, lr 0.0001'),
  '**the same, distilled**': (
    'final/absorb_then_train, distilled',
    f'{_SEARCH}/absorb_then_train, distilled, lr 0.0001',
  ),
}
GEMMA_ROWS = {
  'dense': 'dense',
  'removed only': GEMMA_CHOICE,
  'absorb, no training': f'{GEMMA_CHOICE}, absorb',
  'regularise by annealed gates (ELDeR)': 'regularize',
  'prune, then train': 'prune_then_train',
  '**absorb, then train**': 'absorb_then_train',
  '**the same, distilled**': 'absorb_then_train, distilled',
}


def read(path: pathlib.Path = ROWS) -> dict[str, dict]:
  """Rows by name, as they were run."""
  lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
  return {row.pop('name'): row for row in map(json.loads, lines)}


def kept_name(name: str, found: dict[str, dict]) -> str | None:
  """The name under which a row is kept: its own, or that of the row of all seeds where only that is."""
  return next((key for key in (name, name.split(', seed ')[0]) if key in found), None)


def by_seed(found: dict[str, dict]) -> dict[str, list[dict]]:
  """Name without the seed -> its rows, in the order of benchmarks/results_rows.py."""
  keys = [kept_name(name, found) for name, _ in rows_to_run(found, gemma='any', one_pass=True)]
  groups: dict[str, list[dict]] = {}
  for key in dict.fromkeys(key for key in keys if key):
    groups.setdefault(key.split(', seed ')[0], []).append(found[key])
  return groups


def ranges(layers: list[int]) -> str:
  """[3, 4, 5, 9] -> 3–5, 9."""
  runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1) if layers else []
  return ', '.join(str(run[0]) if len(run) == 1 else f'{run[0]}–{run[-1]}' for run in runs)


def seeds(members: list[dict]) -> int:
  return members[0].get('seeds', len(members))


def perplexity(members: list[dict], corpus: str) -> str:
  """Of several seeds the mean ± the standard deviation.

  Rows from before 2026-11-25 were read back from the document: several seeds are one row there, with 'seeds' and 'stdev'.
  """
  values = [row['ppl'][corpus] for row in members]
  mean, stdev = statistics.mean(values), members[0].get('stdev', {}).get(corpus)
  stdev = statistics.stdev(values) if len(values) > 1 else stdev
  spread = '' if stdev is None else f' ± {stdev:.2f}'
  return (f'{mean:.2f}' if mean < 1e4 else f'{mean:.1e}') + spread


def cells(members: list[dict], corpora: list[str], tasks: list[str]) -> list[str]:
  """Perplexities, accuracies in percent, training TFLOP."""
  figures = [perplexity(members, corpus) for corpus in corpora]
  for task in tasks:
    of = [row['tasks'][task] for row in members if task in row.get('tasks', {})]
    figures.append(f'{100 * of[0]["acc"]:.1f} ± {100 * of[0]["acc_stderr"]:.1f}' if of else '')
  return [*figures, f'{members[0]["teraflops"]:.0f}']


def document(found: dict[str, dict], searched: bool) -> str:
  """A table for each section of each budget: of the rows by which something was chosen, or of all others."""
  groups, text = by_seed(found), ''
  for title, (prefix, budget) in BUDGETS.items():
    own = {
      name.removeprefix(prefix): members for name, members in groups.items() if name.startswith(PASS) == bool(prefix)
    }
    text += tables(title, own, searched) + about([row for members in own.values() for row in members], budget) + '\n\n'
  return text.rstrip() + f'\n\nLearning rates of the small budget: {BEST_LR}; of Gemma {GEMMA_LR}.\n'


def tables(title: str, groups: dict[str, list[dict]], searched: bool) -> str:
  sections: dict[str, dict[str, list[dict]]] = {}
  for name, members in groups.items():
    section, _, rest = name.rpartition('/') if '/' in name else ('final', '', name)
    if section.endswith(CHOSEN_BY) == searched:
      sections.setdefault(section, {})[rest] = members
  text = ''
  for section in sorted(sections, key=lambda s: (s != 'final', s)):
    every = [row for members in sections[section].values() for row in members]
    corpora = list(every[0]['ppl'])
    tasks = list(dict.fromkeys(task for row in every for task in row.get('tasks', {})))
    head = ['row', 'seeds', 'removed', *corpora, *(f'{t}, %' for t in tasks), 'TFLOP']
    lines = [
      [name, str(seeds(members)), ranges(members[0]['removed']), *cells(members, corpora, tasks)]
      for name, members in sections[section].items()
    ]
    text += f'## {title}: {section.replace("/", ", ")}\n\n{markdown_table(head, lines)}\n\n'
  return text


def about(done: list[dict], budget: dict) -> str:
  """Devices, versions on the first of them, and the budget; of several devices, how many rows each did."""
  devices = collections.Counter(row['device'] for row in done)
  named = '; '.join(f'{device} ({n} rows)' if len(devices) > 1 else device for device, n in devices.most_common())
  versions = next(row['versions'] for row in done if row['device'] == devices.most_common(1)[0][0])
  shown = ', '.join(f'{k} {v}' for k, v in versions.items() if k in ('python', 'jax', 'flax', 'optax'))
  return f'Device: {named}; {shown}. Budget: {", ".join(f"{k}={v}" for k, v in budget.items())}.'


def smollm2_table(found: dict[str, dict]) -> str:
  """For docs/results.md: both budgets side by side."""
  groups = by_seed(found)
  head = ['SmolLM2-135M, 30 → 23 layers', 'WikiText-2', 'news', '12 × text: WikiText-2', '12 × text: news']
  lines = [
    [label, *(perplexity(groups[name], corpus) if name else '' for name in names for corpus in (TEST, NEWS))]
    for label, names in SMOLLM2.items()
  ]
  return markdown_table(head, lines) + '\n'


def gemma_table(found: dict[str, dict]) -> str:
  """For docs/results.md."""
  groups = by_seed(found)
  lines = [
    [label, *(perplexity(groups[f'{GEMMA}/{name}'], corpus) for corpus in (TEST, NEWS))]
    for label, name in GEMMA_ROWS.items()
  ]
  return markdown_table([f'{GEMMA}, 18 → 14 layers', 'WikiText-2', 'news'], lines) + '\n'
