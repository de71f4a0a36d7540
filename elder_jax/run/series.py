"""Several runs as one: a search for the number of layers, rounds of removing and training, and several seeds.

Each is an ordinary run in its own folder, `runs/NAME` in the work folder, and resumes like any other.
"""

from collections.abc import Callable
import math
import os
import pathlib
import shutil

import numpy as np

from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.hf import manifest
from elder_jax.hf import push
from elder_jax.hf.source import open_source
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.methods import find_method
from elder_jax.run import by_name
from elder_jax.run import packages
from elder_jax.run import pipeline
from elder_jax.run import workdir
from elder_jax.run.card import write_card
from elder_jax.run.config import Config
from elder_jax.run.how_much import count_removed
from elder_jax.run.removal_settings import HOW_MUCH
from elder_jax.run.results import cosmetic
from elder_jax.run.results import write_pages

ONE = {'seeds': (), 'rounds': 1}


def run(config: Config) -> dict:
  """Executes one run, or a series of runs if the settings call for one, and returns the report.

  Raises:
    PushFailed: the run is finished, but its export was not uploaded. Otherwise as pipeline.run.
  """
  config = config.with_dtype(lambda: hosts.broadcast_json(about.fast_dtype()))
  to = config.output.push_to_hub
  if to:
    hosts.leader_first(lambda: push.check('push_to_hub', to) if hosts.is_leader() else None)
  report = _run_or_series(config)
  if to and (failure := hosts.broadcast_json(_upload(config.path() / 'export', to) if hosts.is_leader() else '')):
    raise push.PushFailed(failure)
  return report


def _upload(export: pathlib.Path, to: str) -> str:
  """Uploads the export; why it was not uploaded, or ''."""
  log(f'uploading {export} to {to}')
  try:
    log(f'uploaded to {push.push(export, to, private=True, setting="push_to_hub")}')
  except (InputError, push.PushFailed) as e:
    why = e.why if isinstance(e, InputError) else f'{e}.'
    again = f'To try again: elder_jax push {export} --to={to}'
    return f'the export {export} is complete, but was not uploaded to {to}: {why} {again}'
  return ''


def _run_or_series(config: Config) -> dict:
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
  """Holds the work folder, executes the runs, and puts export and report where a single run has them."""
  with workdir.held(config):
    hosts.leader_first(lambda: workdir.claim_workdir(config) if hosts.is_leader() else None)
    if report := workdir.finished(config):
      log(f'{config.path()} holds a finished run; printing its report without reading the inputs again')
      return report
    packages.check(config)
    hosts.leader_first(lambda: workdir.record(config, {}) if hosts.is_leader() else None)
    with workdir.noting_failure(config):
      report = do(config)
    if hosts.is_leader():
      _publish(config, report)
    hosts.barrier('series')
    return report


def _run(config: Config, name: str, **changes) -> dict:
  """Executes one of the runs in its own folder."""
  log(f'── {name} ──')
  report = run(config.replace(**changes, workdir=str(_folder(config, name)), push_to_hub=''))
  return report | {'folder': name}


def _folder(config: Config, name: str):
  return config.path() / 'runs' / name


def _publish(config: Config, report: dict):
  """Moves the export to its place, then writes the report. If killed in between, the same command repeats this."""
  work = config.path()
  made = _folder(config, report['folder']) / 'export'
  if made.exists():
    shutil.rmtree(work / 'export', ignore_errors=True)
    os.replace(made, work / 'export')
  for picture in ('curve.svg', 'sweep.svg'):
    if (drawn := _folder(config, report['folder']) / picture).exists():
      shutil.copy(drawn, work / picture)
  if (work / 'export').exists():  # the card of its own run knows nothing of the others
    cosmetic(manifest.CARD, lambda: write_card(work / 'export', report, config.to_json()))
  write_pages(report, work, config.paths.workdir)
  write_json(work / 'report.json', report)


# ---- the search for the number of layers ----


def _search(config: Config) -> dict:
  """Finds the largest number of layers within --max_ppl_increase by bisection, then executes the run with it."""
  limit, tried = config.removal.max_ppl_increase, {}

  def increase(n: int) -> float:
    """Relative increase of the held-out perplexity after the recipe, without its training."""
    if n not in tried:
      dense, pruned = _held_out(config, n)
      tried[n] = math.exp(pruned - dense) - 1
      log(f'--max_ppl_increase={limit:g}: removing {n} layers raises the held-out perplexity by {100 * tried[n]:.1f}%')
    return tried[n]

  source = hosts.leader_first(lambda: open_source(config.paths.model, config.path() / 'source'))
  low, high = 0, _too_many(config, source.num_layers)  # low layers can be removed, high cannot
  while high - low > 1:
    n = (low + high) // 2
    low, high = (n, high) if increase(n) <= limit else (low, n)
  if not low:
    raise InputError(
      'max_ppl_increase', limit, f'removing one layer raises it by {100 * increase(1):.1f}%; allow at least that much.'
    )
  report = _run(config, f'{low}_layers', num_remove=low, max_ppl_increase=None)
  return report | {'search': [[n, tried[n]] for n in sorted(tried)], 'max_ppl_increase': limit}


def _too_many(config: Config, num_layers: int) -> int:
  """The smallest number of layers that the run's methods cannot choose."""
  chosen_by = [find_method(name) for name in config.methods()]
  return next(
    n for n in range(1, num_layers + 1) if n == num_layers or any(m.why_not(config, num_layers, n) for m in chosen_by)
  )


def _held_out(config: Config, n: int) -> tuple[float, float]:
  """Held-out losses, in nats per token, of the dense model and of the model without n layers before training."""
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
  """Alternates pruning and training. Layers and steps are divided evenly; the first rounds get the remainder."""
  source = hosts.leader_first(lambda: open_source(config.paths.model, config.path() / 'source'))
  removal, rounds = config.removal, config.removal.rounds
  counts = count_removed(config, source.spec, source.num_layers, source.dtype)
  if removal.remove_layers is not None or len(counts) > 1 or len(removal.method) > 1:
    raise InputError(
      'rounds', rounds, 'each round chooses its own layers; give one method and one number of layers (--num_remove).'
    )
  total = counts[0]
  if total < rounds:
    raise InputError('rounds', rounds, f'each round removes a layer or more, but only {total} go; use fewer rounds.')
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
  """The settings for how long round i trains, and on which sequences."""
  rounds, batches = config.removal.rounds, config.one_pass
  changes: dict = {'seed': config.data.seed + i}
  if config.training.steps is not None:
    return changes | {'train_steps': _part(config.training.steps, rounds, i)}
  if batches < rounds:
    raise InputError('rounds', rounds, f'there are only {batches} batches to train on; give more text or fewer rounds.')
  return changes | {
    'num_sequences': _part(batches, rounds, i) * config.data.batch_size,
    'train_tokens': None,
  }


def _of_rounds(config: Config, num_layers: int, kept: list[int], reports: list[dict]) -> dict:
  """The last round's report, relative to the dense model: a row per round, with the dense model's layer numbers."""
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
  report['held_out_loss'] = None  # each round holds out different sequences
  for row in rows:
    row.pop('held_out', None)
  report['steps'] = sum(of_round['steps'] for of_round in reports)
  return report


# ---- seeds ----


def _seeds(config: Config) -> dict:
  """Executes a run per seed. Returns the first one's report with means and standard deviations of all."""
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
  """Mean and sample standard deviation, which is None for a single value."""
  of_many = np.array(values, float)
  return {
    'values': values,
    'mean': float(of_many.mean()),
    'deviation': float(of_many.std(ddof=1)) if len(values) > 1 else None,
  }
