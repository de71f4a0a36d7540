"""What a reader should know before trusting the figures of a run."""

import math

from elder_jax.run.caveats import caveats
from elder_jax.run.report import exported_of
from elder_jax.run.report import reference_of
from elder_jax.run.report import verdict
from elder_jax.run.report import verification
from elder_jax.run.tables import number
from elder_jax.run.tables import size

FEW_QUESTIONS = 200  # of a task


def ratios(report: dict) -> dict[str, float]:
  """{corpus: perplexity of the exported model over that of the reference}, of those that have both."""
  reference, exported = reference_of(report), exported_of(report)
  found = {corpus: number(exported.ppl.get(corpus)) / _above_0(reference.ppl.get(corpus)) for corpus in report['ppl']}
  return {corpus: ratio for corpus, ratio in found.items() if not math.isnan(ratio)}


def _above_0(value) -> float:
  return value if (value := number(value)) > 0 else math.nan


def warnings(report: dict) -> list[str]:
  """Sentences: those of the model card first, then those about the measurements."""
  return [*_unmeasured(report), *caveats(report), *_questions(report), *_rivals(report), *_export(report)]


def _unmeasured(report: dict) -> list[str]:
  if not report['ppl'] and not report['tasks']['dense']:
    return ['Nothing was measured, so this page cannot show what the removal costs. Use --eval_data and --tasks.']
  found = ratios(report)
  return [f'Perplexity on {corpus} has no finite value.' for corpus in report['ppl'] if corpus not in found]


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
