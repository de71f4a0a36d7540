"""What a reader should know before trusting the figures of a run."""

import math

from elder_jax.run.report import exported_of
from elder_jax.run.report import reference_of
from elder_jax.run.report import verdict
from elder_jax.run.report import verification
from elder_jax.run.tables import compact
from elder_jax.run.tables import figure
from elder_jax.run.tables import number
from elder_jax.run.tables import size

WORSE = 1.3  # perplexity over that of the dense model
APART = 1.1  # the largest such ratio of a text over the smallest
FEW_TOKENS = 1_000_000  # of training
FEW_QUESTIONS = 200  # of a task


def ratios(report: dict) -> dict[str, float]:
  """{corpus: perplexity of the exported model over that of the reference}, of those that have both."""
  reference, exported = reference_of(report), exported_of(report)
  found = {corpus: number(exported.ppl.get(corpus)) / _above_0(reference.ppl.get(corpus)) for corpus in report['ppl']}
  return {corpus: ratio for corpus, ratio in found.items() if not math.isnan(ratio)}


def _above_0(value) -> float:
  return value if (value := number(value)) > 0 else math.nan


def warnings(report: dict) -> list[str]:
  """Sentences, the most important first."""
  return [*_perplexity(report), *_training(report), *_questions(report), *_rivals(report), *_export(report)]


def _perplexity(report: dict) -> list[str]:
  if not report['ppl'] and not report['tasks']['dense']:
    return ['Nothing was measured, so this page cannot show what the removal costs. Use --eval_data and --tasks.']
  found, name = ratios(report), reference_of(report).name
  lines = [f'Perplexity on {corpus} has no finite value.' for corpus in report['ppl'] if corpus not in found]
  if worse := {corpus: ratio for corpus, ratio in found.items() if ratio >= WORSE}:
    listed = ' and '.join(f'{figure(ratio)} × {name} on {corpus}' for corpus, ratio in worse.items())
    lines.insert(0, f'Perplexity is {listed}.')
    most, least = max(found, key=found.__getitem__), min(found, key=found.__getitem__)
    if found[most] >= APART * found[least]:
      lines[0] += f' The model lost more on {most} than on {least}: measure it on text like yours.'
  return lines


def _training(report: dict) -> list[str]:
  tokens = (report.get('steps') or 0) * (report.get('tokens_per_step') or 0)
  if not 0 < tokens < FEW_TOKENS:
    return []
  return [f'Trained on {compact(tokens)} tokens: a smoke test. Healing takes millions of tokens.']


def _questions(report: dict) -> list[str]:
  few = {
    task: n
    for task, values in report['tasks']['dense'].items()
    if isinstance(n := values.get('n'), int) and n < FEW_QUESTIONS
  }
  if not few:
    return []
  listed = ', '.join(f'{task} ({n})' for task, n in few.items())
  return [f'Tasks with fewer than {FEW_QUESTIONS} questions are noisy: {listed}.']


def _rivals(report: dict) -> list[str]:
  return verdict(report) if report['ppl'] else []


def _export(report: dict) -> list[str]:
  lines = [verification(report).replace('**', '')] if verification(report) else []
  dense, pruned = (number(bytes_of(report).get(which)) for which in ('dense', 'pruned'))
  if pruned > dense:
    lines.append(
      f'The export is larger than its source ({size(dense)} → {size(pruned)}): its weights are stored in a wider type.'
    )
  return lines


def bytes_of(report: dict) -> dict:
  """{'dense', 'pruned'}: bytes on disk; empty where the report has none. Cuts by tensor name report gigabytes."""
  gigabytes = report.get('gigabytes') or {}
  return report.get('bytes') or {which: 1e9 * number(value) for which, value in gigabytes.items()}
