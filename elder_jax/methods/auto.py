"""The method auto: of the layers that several methods choose, those that the rest can best do without.

No one method chooses well for every model and depth. What tells them apart is the loss after `absorb`, on text that it
did not read: it ranks choices as training does, which the loss after bare removal does not
(docs/decisions/choosing.md).
"""

from collections.abc import Callable
from collections.abc import MutableMapping
import dataclasses
import functools
import math

import numpy as np

from elder_jax.errors import InputError
from elder_jax.methods import contest
from elder_jax.methods import judging
from elder_jax.methods.method import Method
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

# One method that chooses a contiguous block and three that choose single layers, and what part of the text they read: ppl
# runs half of the model for every layer, and chooses the same or nearly so by a quarter of the text
# (docs/decisions/choosing.md).
PARTS = {'cosine_block': 1.0, 'shortgpt': 1.0, 'taylor': 1.0, 'ppl': 0.25}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Layers to remove, in the order of `method`, and the mean LM loss per token that is left when they are absorbed.

  again: what the best were judged by afterwards (contest.py), the lower the better; None: they were not.
  """

  method: str
  removed: list[int]
  loss: float
  again: float | None = None


def method(candidates: dict[str, Method]) -> Method:
  """The entry of the table; `candidates` are the methods of PARTS."""
  return Method(
    functools.partial(choose, candidates),
    'what cosine_block, shortgpt, taylor or ppl chooses, whichever leaves the least loss when it is absorbed',
    nested=False,
    refuses=why_not,
    programs=functools.partial(programs, candidates),
    reads=('score_steps', 'judge_steps', 'judge_by'),
  )


def usable(candidates: dict[str, Method], settings, num_layers: int, num_remove: int) -> dict[str, Method]:
  """The candidates that have enough layers to choose from; cosine_block always has."""
  return {name: m for name, m in candidates.items() if not m.why_not(settings, num_layers, num_remove)}


def why_not(settings, num_layers: int, num_remove: int) -> str:
  """Method.refuses: of the candidates one can always choose; but judging needs text of its own."""
  del num_layers, num_remove
  if settings.one_pass >= 2:
    left = settings.one_pass - 2 * num_fitted(settings.removal.score_steps, settings.one_pass)
    if settings.removal.judge_steps <= left:
      return ''
    return (
      f'judges after --judge_steps={settings.removal.judge_steps} steps on text that it is not judged by, but of the '
      f'{settings.one_pass} batches of a pass {left} are left; give more sequences, or lower one of --judge_steps and '
      '--score_steps.'
    )
  return (
    f'judges by batches that no candidate was fitted on, but --num_sequences={settings.data.sequences} and '
    f'--batch_size={settings.data.batch_size} make only one; give more sequences, a smaller batch, or '
    '--method=cosine_block.'
  )


def num_fitted(score_steps: int, one_pass: int) -> int:
  """Batches to choose and absorb by, the first of the training text; as many more are held out to judge by.

  Training reads the held-out ones, too. That is fine: no figure is reported of them but the losses of the candidates,
  which all are judged before any is trained.
  """
  return min(score_steps, one_pass // 2)


def choose(candidates: dict[str, Method], context: Context, num_remove: int) -> Choice:
  """Method.choose; `about` has the candidates, the best first, each with its own scores."""
  steps = num_fitted(context.settings.removal.score_steps, len(context.batches))
  found: dict[str, Choice] = {}
  notes = context.notes(f'auto-{num_remove}')
  for name, entry in usable(candidates, context.settings, context.model.num_layers, num_remove).items():
    context.log.say(f'choosing layers by {name}')
    if name not in notes:
      part = dataclasses.replace(context, score_steps=math.ceil(PARTS[name] * steps))
      notes[name] = entry.choose(part, num_remove).to_json()
    found[name] = Choice.from_json(notes[name])
    if not np.isfinite(found[name].scores).all():
      raise InputError(
        'method', 'auto', f'some scores of {name} are not finite; check the weights, or use --dtype=float32.'
      )

  def say(c):
    return context.log.say(f'without layers {sorted(c.removed)}, which {c.method} chooses: loss {c.loss:.4f}')

  fit, held_out = context.batches[:steps], context.batches[steps : 2 * steps]
  removed = {name: choice.removed for name, choice in found.items()}
  judged = judge(context.model, removed, fit, held_out, context.mode, say, notes)
  if contest.is_held(context.settings):
    judged = _again(context, judged, fit, held_out, notes)
  told = [dataclasses.asdict(c) | {'scores': found[c.method].scores} for c in judged]
  return Choice(judged[0].removed, about={'candidates': told})


def _again(
  context: Context, judged: list[Candidate], fit: Batches, held_out: Batches, notes: MutableMapping
) -> list[Candidate]:
  """The candidates, the first ones in their order by what contest.py finds."""
  best, others = judged[: contest.FINALISTS], judged[contest.FINALISTS :]
  figure_of = contest.figures(context, {c.method: c.removed for c in best}, held_out, fit, notes)
  again = [dataclasses.replace(c, again=figure_of[c.method]) for c in best]
  if not np.isfinite(list(figure_of.values())).all():
    raise InputError('judge_by', context.settings.removal.judge_by, 'gave a figure that is not finite; check it.')
  for c in again:
    context.log.say(
      f'without layers {sorted(c.removed)}, which {c.method} chooses: judged again {figure_of[c.method]:.4f}'
    )
  return sorted(again, key=lambda c: figure_of[c.method]) + others


def judge(
  model: Decoder,
  choices: dict[str, list[int]],
  fit: Batches,
  held_out: Batches,
  mode: Mode,
  log: Callable[[Candidate], None] = lambda candidate: None,
  notes: MutableMapping | None = None,
) -> list[Candidate]:
  """The candidates, the best first.

  Args:
    choices: {method: layers to remove}; what several methods choose is judged once, under the first one's name.
    fit, held_out, notes: of judging.Judge.
    log: called with each candidate when it has been judged.
  """
  distinct = {frozenset(removed): name for name, removed in reversed(choices.items())}
  loss_of, candidates = judging.Judge(model, fit, held_out, mode, notes), []
  loss_of.share(list(choices.values()))
  for name, removed in choices.items():
    if distinct[frozenset(removed)] == name:
      candidates.append(Candidate(name, removed, loss_of(removed)))
      log(candidates[-1])
  if not np.isfinite([candidate.loss for candidate in candidates]).all():
    raise InputError('method', 'auto', 'some losses are not finite; look at the weights, or use --dtype=float32.')
  return sorted(candidates, key=lambda candidate: candidate.loss)


def programs(candidates: dict[str, Method], shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs: the candidates', then judging them."""
  settings = shapes.settings
  entries = usable(candidates, settings, shapes.num_layers, num_remove)
  steps = num_fitted(settings.removal.score_steps, settings.one_pass)
  found = []
  for name, entry in entries.items():
    calls = math.ceil(PARTS[name] * steps)
    found += [dataclasses.replace(p, calls=calls) for p in entry.programs(shapes, num_remove)]
  found += judging.programs(shapes, num_remove, len(entries), steps)
  return found + (contest.programs(shapes, num_remove) if contest.is_held(settings) else [])
