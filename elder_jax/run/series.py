"""Several runs as one: the search for a depth, rounds of removing and training, and several seeds.

Each is an ordinary run in a folder of its own within the work folder, `runs/NAME`, and resumes as such.
"""

from collections.abc import Callable
import math
import os
import shutil

import numpy as np

from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.methods import find_method
from elder_jax.run import by_name
from elder_jax.run import pipeline
from elder_jax.run import workdir
from elder_jax.run.config import Config
from elder_jax.run.how_much import count_removed
from elder_jax.run.removal_settings import HOW_MUCH
from elder_jax.run.results import write_pages

ONE = {'seeds': (), 'rounds': 1}


def run(config: Config) -> dict:
  """A run, or a series of them where the settings ask for one; the report. As pipeline.run otherwise."""
  if why := by_name.why(config):
    return by_name.run(config, why)
  if config.removal.max_ppl_increase is not None:
    return _series(config, _search)
  if config.data.seeds:
    return _series(config, _seeds)
  if config.removal.rounds > 1:
    return _series(config, _rounds)
  return pipeline.run(config)


def _series(config: Config, do: Callable[[Config], dict]) -> dict:
  """Holds the work folder, does the runs, and puts the last one's export and report where a single run has them."""
  with workdir.held(config):
    hosts.leader_first(lambda: workdir.claim_workdir(config) if hosts.is_leader() else None)
    if report := workdir.finished(config):
      log(f'{config.path()} holds a finished run; its report follows, its inputs are not read again')
      return report
    hosts.leader_first(lambda: workdir.record(config, {}) if hosts.is_leader() else None)
    with workdir.noting_failure(config):
      report = do(config)
    if hosts.is_leader():
      _publish(config, report)
    hosts.barrier('series')
    return report


def _run(config: Config, name: str, **changes) -> dict:
  """One of the runs, in its folder."""
  log(f'── {name} ──')
  report = run(config.replace(**changes, workdir=str(_folder(config, name))))
  return report | {'folder': name}


def _folder(config: Config, name: str):
  return config.path() / 'runs' / name


def _publish(config: Config, report: dict):
  """The export gets its place once the report is whole; killed between the two, the same is done again."""
  work = config.path()
  made = _folder(config, report['folder']) / 'export'
  if made.exists():
    shutil.rmtree(work / 'export', ignore_errors=True)
    os.replace(made, work / 'export')
  for picture in ('curve.svg', 'sweep.svg'):
    if (drawn := _folder(config, report['folder']) / picture).exists():
      shutil.copy(drawn, work / picture)
  write_pages(report, work, config.paths.workdir)
  write_json(work / 'report.json', report)


# ---- how deep ----


def _search(config: Config) -> dict:
  """The most layers that may go by --max_ppl_increase, found by halving; then the run itself with that many."""
  limit, tried = config.removal.max_ppl_increase, {}

  def increase(n: int) -> float:
    """Of the perplexity on held-out rows, by the recipe without its training."""
    if n not in tried:
      dense, pruned = _held_out(config, n)
      tried[n] = math.exp(pruned - dense) - 1
      log(f'--max_ppl_increase={limit:g}: without {n} layers the held-out perplexity rises by {100 * tried[n]:.1f}%')
    return tried[n]

  source = hosts.leader_first(lambda: open_source(config.paths.model, config.path() / 'source'))
  low, high = 0, _too_many(config, source.num_layers)  # low can be removed, high cannot
  while high - low > 1:
    n = (low + high) // 2
    low, high = (n, high) if increase(n) <= limit else (low, n)
  if not low:
    raise InputError(
      'max_ppl_increase', limit, f'one layer less costs {100 * increase(1):.1f}% already; allow more than that.'
    )
  report = _run(config, f'{low}_layers', num_remove=low, max_ppl_increase=None)
  return report | {'search': [[n, tried[n]] for n in sorted(tried)], 'max_ppl_increase': limit}


def _too_many(config: Config, num_layers: int) -> int:
  """The least number of layers that the run's methods cannot choose."""
  chosen_by = [find_method(name) for name in config.methods()]
  return next(
    n for n in range(1, num_layers + 1) if n == num_layers or any(m.why_not(config, num_layers, n) for m in chosen_by)
  )


def _held_out(config: Config, n: int) -> tuple[float, float]:
  """Held-out losses of the dense model and of the one without n layers, not trained."""
  changes = ONE | dict(num_remove=n, max_ppl_increase=None, compare=(), eval_data={}, tasks=(), verify='jax')
  changes |= dict(
    num_sequences=config.data.sequences, train_tokens=None, train_steps=0, validate_every=1, export='last'
  )
  changes |= dict(distill=0.0, distill_hidden=0.0, teacher='')
  report = _run(config, f'search/{n}', **changes)
  shutil.rmtree(_folder(config, f'search/{n}') / 'export', ignore_errors=True)
  return report['held_out_loss'], report['rows'][-1]['held_out_loss']


# ---- rounds ----


def _rounds(config: Config) -> dict:
  """Prunes and trains in turns; the layers and the steps are shared out evenly, the first rounds getting what is over."""
  source = hosts.leader_first(lambda: open_source(config.paths.model, config.path() / 'source'))
  removal, rounds = config.removal, config.removal.rounds
  counts = count_removed(config, source.spec, source.num_layers, source.dtype)
  if removal.remove_layers is not None or len(counts) > 1 or len(removal.method) > 1:
    raise InputError(
      'rounds', rounds, 'each round chooses its layers anew: give one method and one number of layers (--num_remove).'
    )
  total = counts[0]
  if total < rounds:
    raise InputError('rounds', rounds, f'{total} layers are to go, at least one in a round; ask for fewer rounds.')
  kept, reports, model = list(range(source.num_layers)), [], config.paths.model
  for i in range(rounds):
    last = i == rounds - 1
    changes = (
      dict.fromkeys(HOW_MUCH) | ONE | dict(num_remove=_part(total, rounds, i), model=model, **_length(config, i))
    )
    if i:
      changes |= dict(teacher=config.paths.teacher or config.paths.model) if config.training.taught else {}
    if not last:
      changes |= dict(export_dtype='float32', compare=())
    report = _run(config, f'round_{i + 1}', **changes)
    removed = [kept[l] for l in report['removed']]
    kept = [l for l in kept if l not in removed]
    reports.append(report | {'removed_here': removed})
    model = str(_folder(config, f'round_{i + 1}') / 'export')
  return _of_rounds(config, source.num_layers, kept, reports)


def _part(total: int, parts: int, i: int) -> int:
  return total // parts + (i < total % parts)


def _length(config: Config, i: int) -> dict:
  """How long round i trains, and on which of the text."""
  rounds, batches = config.removal.rounds, config.one_pass
  changes: dict = {'seed': config.data.seed + i}
  if config.training.steps is not None:
    return changes | {'train_steps': _part(config.training.steps, rounds, i)}
  if batches < rounds:
    raise InputError('rounds', rounds, f'there are {batches} batches to train on; give more text or fewer rounds.')
  return changes | {
    'num_sequences': _part(batches, rounds, i) * config.data.batch_size,
    'train_tokens': None,
  }


def _of_rounds(config: Config, num_layers: int, kept: list[int], reports: list[dict]) -> dict:
  """The last round's report, told of the dense model: a row for each round, layers by its numbers."""
  report, rows, removed = dict(reports[-1]), [], []
  for i, of_round in enumerate(reports):
    removed = sorted(removed + of_round['removed_here'])
    rows.append(of_round['rows'][-1] | {'removed': removed, 'round': i + 1})
  first = reports[0]
  report |= {'model': config.paths.model, 'num_layers': num_layers, 'removed': removed, 'kept': kept, 'rows': rows}
  report |= {'order': [l for of_round in reports for l in of_round['removed_here']], 'choices': [], 'gates': []}
  report['params'] = {'dense': first['params']['dense'], 'pruned': reports[-1]['params']['pruned']}
  sizes = [of_round.get('bytes', {}) for of_round in reports]
  report['bytes'] = {'dense': sizes[0].get('dense'), 'pruned': sizes[-1].get('pruned')}
  report['ppl'] = {c: {'dense': v['dense'], 'pruned': reports[-1]['ppl'][c]['pruned']} for c, v in first['ppl'].items()}
  report['tasks'] = {'dense': first['tasks']['dense'], 'pruned': reports[-1]['tasks']['pruned']}
  report['held_out_loss'] = None  # each round holds out other rows
  for row in rows:
    row.pop('held_out', None)
  report['steps'] = sum(of_round['steps'] for of_round in reports)
  return report


# ---- seeds ----


def _seeds(config: Config) -> dict:
  """A run of each seed; the first one's report, with means and deviations of all."""
  reports = [_run(config, f'seed_{seed}', seed=seed, seeds=()) for seed in config.data.seeds]
  for seed in config.data.seeds[1:]:
    shutil.rmtree(_folder(config, f'seed_{seed}') / 'export', ignore_errors=True)
  keys = [(row['method'], row['recipe'], len(row['removed'])) for row in reports[0]['rows']]
  rows = []
  for i, (method, recipe, count) in enumerate(keys):
    of_seeds = [report['rows'][i] for report in reports]
    ppl = {c: _statistics([row['ppl'][c] for row in of_seeds]) for c in of_seeds[0]['ppl']}
    rows.append({'method': method, 'recipe': recipe, 'removed': count, 'ppl': ppl})
  return reports[0] | {'seeds': {'seeds': list(config.data.seeds), 'rows': rows}}


def _statistics(values: list[float]) -> dict:
  """Mean and sample deviation; of one value the deviation is None."""
  of_many = np.array(values, float)
  return {
    'values': values,
    'mean': float(of_many.mean()),
    'deviation': float(of_many.std(ddof=1)) if len(values) > 1 else None,
  }
