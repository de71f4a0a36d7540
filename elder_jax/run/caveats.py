"""Warnings about a model, drawn from the figures of its report."""

import math

from elder_jax.run.tables import figure
from elder_jax.run.tables import number

FEW_TOKENS = 1_000_000  # a model trained on fewer is a smoke test
WORSE = 1.5  # a perplexity this many times the original's is clearly worse
UNEVEN = 1.1  # and so is one that rises this many times as much as on another text


def caveats(report: dict) -> list[str]:
  """A sentence for each reason not to use the model as it is; empty where the report holds none."""
  return [*_training(report), *_perplexity(report)]


def _training(report: dict) -> list[str]:
  steps = report.get('lineage') or [
    {'removed': report['removed'], 'tokens': report.get('steps', 0) * report.get('tokens_per_step', 0)}
  ]
  tokens = sum(step.get('tokens') or 0 for step in steps)
  if tokens >= FEW_TOKENS:
    return []
  if tokens:
    return [f'It was trained on {tokens:,} tokens only: a smoke test of the method, not a model for use.']
  return ['It was not trained after layers were removed.'] if any(step.get('removed') for step in steps) else []


def _perplexity(report: dict) -> list[str]:
  rises = _rises(report)
  if not rises:
    return []
  least = min([*rises.values(), *_held_out_rise(report)])
  worst = sorted(rises, key=lambda corpus: rises[corpus], reverse=True)
  told = ', '.join(f'{figure(rises[corpus])} × on {corpus}' for corpus in worst)
  if report.get('train_data') and rises[worst[0]] > UNEVEN * least:
    like = '' if least in rises.values() else f', {figure(least)} × on text held out of the training text'
    return [f'Perplexity against the original: {told}{like}. Expect the larger rise on text unlike the training text.']
  return [f'Perplexity against the original: {told}.'] if rises[worst[0]] >= WORSE else []


def _rises(report: dict) -> dict[str, float]:
  """{corpus: perplexity by that of the original}. A run that heals has the original only where a teacher was given."""
  teacher = (report.get('teacher') or {}).get('ppl') or {}
  found = {}
  for corpus, ppl in report['ppl'].items():
    before = number(teacher.get(corpus) if report.get('heals') else ppl.get('dense'))
    rise = number(ppl.get('pruned')) / before if before > 0 else math.nan
    if math.isfinite(rise):
      found[corpus] = rise
  return found


def _held_out_rise(report: dict) -> list[float]:
  """The same on text held out of the training text, where it was measured."""
  if report.get('heals'):
    return []
  rise = number(report['rows'][-1].get('held_out_loss')) - number(report.get('held_out_loss'))
  return [math.exp(rise)] if math.isfinite(rise) and abs(rise) < 100 else []
