"""The method auto: runs several methods and keeps the choice with the lowest held-out loss after `absorb`.

No single method is best for every model and depth. The held-out loss after `absorb` ranks the choices like the loss after
training; the loss after plain removal does not (docs/decisions/choosing.md).
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

# Candidate -> the fraction of the calibration data that it reads. One chooses a contiguous block, three choose single
# layers. ppl runs half of the model per layer, and its choice from a quarter of the data is the same or almost the same
# (docs/decisions/choosing.md).
PARTS = {'cosine_block': 1.0, 'shortgpt': 1.0, 'taylor': 1.0, 'ppl': 0.25}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """The choice of one method and its mean held-out LM loss per token after `absorb`.

  removed: Layers in the order in which `method` returned them.
  again: The result of the second comparison (contest.py), lower is better; None if the candidate was not in it.
  """

  method: str
  removed: list[int]
  loss: float
  again: float | None = None


def method(candidates: dict[str, Method]) -> Method:
  """Makes the entry of METHODS. candidates: the methods named in PARTS."""
  return Method(
    functools.partial(choose, candidates),
    'the choice of cosine_block, shortgpt, taylor or ppl with the lowest held-out loss after absorb',
    nested=False,
    refuses=why_not,
    programs=functools.partial(programs, candidates),
    reads=('score_steps', 'judge_steps', 'judge_by'),
  )


def usable(candidates: dict[str, Method], settings, num_layers: int, num_remove: int) -> dict[str, Method]:
  """Returns the candidates that can choose `num_remove` layers; cosine_block always can."""
  return {name: m for name, m in candidates.items() if not m.why_not(settings, num_layers, num_remove)}


def why_not(settings, num_layers: int, num_remove: int) -> str:
  """Implements Method.refuses. At least one candidate can always choose, but comparing them needs held-out batches."""
  del num_layers, num_remove
  if settings.one_pass >= 2:
    left = settings.one_pass - 2 * num_fitted(settings.removal.score_steps, settings.one_pass)
    if settings.removal.judge_steps <= left:
      return ''
    return (
      f'needs --judge_steps={settings.removal.judge_steps} batches besides those that it scores and compares on, but only '
      f'{left} of the {settings.one_pass} batches are left; give more sequences, or lower --judge_steps or --score_steps.'
    )
  return (
    f'compares its candidates on held-out batches, but --num_sequences={settings.data.sequences} and '
    f'--batch_size={settings.data.batch_size} make only one batch; give more sequences, a smaller batch, or '
    '--method=cosine_block.'
  )


def num_fitted(score_steps: int, one_pass: int) -> int:
  """Returns the number of batches to score and fit on. They come first in the training text; as many more are held out.

  Training reads the held-out batches later. That is fine: the only figures reported on them are the candidates' losses,
  which are measured before any training.
  """
  return min(score_steps, one_pass // 2)


def choose(candidates: dict[str, Method], context: Context, num_remove: int) -> Choice:
  """Implements Method.choose. `about` holds the candidates, best first, each with its own scores."""
  steps = num_fitted(context.settings.removal.score_steps, len(context.batches))
  found: dict[str, Choice] = {}
  notes = context.notes(f'auto-{num_remove}')
  for name, entry in usable(candidates, context.settings, context.model.num_layers, num_remove).items():
    context.log.say(f'choosing layers with {name}')
    if name not in notes:
      part = dataclasses.replace(context, score_steps=math.ceil(PARTS[name] * steps))
      notes[name] = entry.choose(part, num_remove).to_json()
    found[name] = Choice.from_json(notes[name])
    if not np.isfinite(found[name].scores).all():
      raise InputError(
        'method', 'auto', f'some scores of {name} are not finite; check the weights, or use --dtype=float32.'
      )

  def say(c):
    return context.log.say(f'candidate {c.method}: layers {sorted(c.removed)}, held-out loss {c.loss:.4f}')

  fit, held_out = context.batches[:steps], context.batches[steps : 2 * steps]
  removed = {name: choice.removed for name, choice in found.items()}
  judged = judge(context.model, removed, fit, held_out, context.mode, say, notes)
  if contest.is_held(context.settings):
    judged = _again(context, judged, fit, held_out, notes)
  entries = [dataclasses.asdict(c) | {'scores': found[c.method].scores} for c in judged]
  return Choice(judged[0].removed, about={'candidates': entries})


def _again(
  context: Context, judged: list[Candidate], fit: Batches, held_out: Batches, notes: MutableMapping
) -> list[Candidate]:
  """Compares the best candidates a second time (contest.py) and returns all, the finalists first in their new order."""
  best, others = judged[: contest.FINALISTS], judged[contest.FINALISTS :]
  figure_of = contest.figures(context, {c.method: c.removed for c in best}, held_out, fit, notes)
  again = [dataclasses.replace(c, again=figure_of[c.method]) for c in best]
  if not np.isfinite(list(figure_of.values())).all():
    raise InputError(
      'judge_by',
      context.settings.removal.judge_by,
      'is not finite for some candidate; check the weights, or your own function.',
    )
  for c in again:
    context.log.say(
      f'candidate {c.method}: layers {sorted(c.removed)}, second comparison {figure_of[c.method]:.4f} (lower is better)'
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
  """Returns the candidates, lowest held-out loss first.

  Args:
    choices: {method: layers to remove}. If several methods choose the same layers, only the first one is a candidate.
    fit, held_out, notes: See judging.Judge.
    log: Called with each candidate once its loss is known.
  """
  distinct = {frozenset(removed): name for name, removed in reversed(choices.items())}
  loss_of, candidates = judging.Judge(model, fit, held_out, mode, notes), []
  loss_of.share(list(choices.values()))
  for name, removed in choices.items():
    if distinct[frozenset(removed)] == name:
      candidates.append(Candidate(name, removed, loss_of(removed)))
      log(candidates[-1])
  if not np.isfinite([candidate.loss for candidate in candidates]).all():
    raise InputError('method', 'auto', 'some losses are not finite; check the weights, or use --dtype=float32.')
  return sorted(candidates, key=lambda candidate: candidate.loss)


def programs(candidates: dict[str, Method], shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs: the programs of the candidates, then those that compare them."""
  settings = shapes.settings
  entries = usable(candidates, settings, shapes.num_layers, num_remove)
  steps = num_fitted(settings.removal.score_steps, settings.one_pass)
  found = []
  for name, entry in entries.items():
    calls = math.ceil(PARTS[name] * steps)
    found += [dataclasses.replace(p, calls=calls) for p in entry.programs(shapes, num_remove)]
  found += judging.programs(shapes, num_remove, len(entries), steps)
  return found + (contest.programs(shapes, num_remove) if contest.is_held(settings) else [])
