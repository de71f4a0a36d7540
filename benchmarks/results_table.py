"""The document of the results table (benchmarks/results.py) from its rows."""

import collections
import statistics

import numpy as np

from benchmarks.results_rows import BEST_LR
from benchmarks.results_rows import BUDGET
from benchmarks.results_rows import GEMMA_LR
from benchmarks.results_rows import PASS
from benchmarks.results_rows import PASS_BUDGET
from elder_jax.run.tables import markdown_table


def ranges(layers: list[int]) -> str:
  """[3, 4, 5, 9] -> 3–5, 9."""
  runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1) if layers else []
  return ', '.join(str(run[0]) if len(run) == 1 else f'{run[0]}–{run[-1]}' for run in runs)


def seeds(members: list[dict]) -> int:
  return members[0].get('seeds', len(members))


def cells(members: list[dict], corpora: list[str], tasks: list[str]) -> list[str]:
  """Perplexities, accuracies in percent, training TFLOP; of several seeds the mean ± the standard deviation.

  Rows of before 2026-11-25 were read back from the document: several seeds are one row there, with 'seeds' and 'stdev'.
  """
  figures = []
  for corpus in corpora:
    values = [row['ppl'][corpus] for row in members]
    mean, stdev = statistics.mean(values), members[0].get('stdev', {}).get(corpus)
    stdev = statistics.stdev(values) if len(values) > 1 else stdev
    spread = '' if stdev is None else f' ± {stdev:.2f}'
    figures.append((f'{mean:.2f}' if mean < 1e4 else f'{mean:.1e}') + spread)
  for task in tasks:
    of = [row['tasks'][task] for row in members if task in row.get('tasks', {})]
    figures.append(f'{100 * of[0]["acc"]:.1f} ± {100 * of[0]["acc_stderr"]:.1f}' if of else '')
  return [*figures, f'{members[0]["teraflops"]:.0f}']


def document(done: dict[str, dict]) -> str:
  """The tables of each budget under a heading."""
  one_pass = {name.removeprefix(f'{PASS}/'): row for name, row in done.items() if name.startswith(f'{PASS}/')}
  small = {name: row for name, row in done.items() if not name.startswith(f'{PASS}/')}
  rates = f'{BEST_LR}; of Gemma {GEMMA_LR}'
  text = ''
  if one_pass:
    text += f'## One pass over the text\n\n{table(one_pass)}\n{about(one_pass, PASS_BUDGET)}\n\n'
  return (
    text + f"## A sixteenth of the paper's text\n\n{table(small)}\n{about(small, BUDGET)} Learning rates: {rates}.\n"
  )


def table(done: dict[str, dict]) -> str:
  corpora = list(next(iter(done.values()))['ppl'])
  tasks = list(dict.fromkeys(task for row in done.values() for task in row.get('tasks', {})))
  groups: dict[str, dict[str, list[dict]]] = {}
  for name, row in done.items():
    section, _, rest = name.rpartition('/') if '/' in name else ('final', '', name)
    groups.setdefault(section, {}).setdefault(rest.split(', seed ')[0], []).append(row)
  lines = []
  for section in sorted(groups, key=lambda s: (s != 'final', s)):
    head = [section, 'seeds', 'removed', *corpora, *(f'{t}, %' for t in tasks), 'TFLOP']
    rows = []
    for name, members in groups[section].items():
      rows.append([name, str(seeds(members)), ranges(members[0]['removed']), *cells(members, corpora, tasks)])
    lines += [markdown_table(head, rows), '']
  return '\n'.join(lines)


def about(done: dict[str, dict], budget: dict) -> str:
  """Devices, the versions on the first of them, and the budget; where there are several devices, how many rows each did."""
  devices = collections.Counter(row['device'] for row in done.values())
  named = '; '.join(f'{device} ({n} rows)' if len(devices) > 1 else device for device, n in devices.most_common())
  versions = next(row['versions'] for row in done.values() if row['device'] == devices.most_common(1)[0][0])
  shown = ', '.join(f'{k} {v}' for k, v in versions.items() if k in ('python', 'jax', 'flax', 'optax'))
  return f'Device: {named}; {shown}. Budget: {", ".join(f"{k}={v}" for k, v in budget.items())}.'
