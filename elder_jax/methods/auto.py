"""The method auto: of the layers that several methods choose, those that the rest can best do without.

No one method chooses well for every model and depth. What tells them apart is the loss after `absorb`, on text that it
did not read: it ranks choices as training does, which the loss after bare removal does not (docs/decisions.md).
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import numpy as np

from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.methods.method import Method
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.training import losses

# One method that chooses a contiguous block and two that choose single layers, and what part of the text they read: ppl
# runs half of the model for every layer, and chooses the same or nearly so by a quarter of the text (docs/decisions.md).
PARTS = {'cosine_block': 1.0, 'taylor': 1.0, 'ppl': 0.25}
# What candidates are judged after: the part of `absorb` that gains most, for a fraction of its time.
QUICK = {'after': 0, 'attention': False}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Layers to remove, in the order of `method`, and the mean LM loss per token that is left when they are absorbed."""

  method: str
  removed: list[int]
  loss: float


def method(candidates: dict[str, Method]) -> Method:
  """The entry of the table; `candidates` are the methods of PARTS."""
  return Method(
    functools.partial(choose, candidates),
    'what cosine_block, taylor or ppl chooses, whichever leaves the least loss when it is absorbed',
    nested=False,
    refuses=why_not,
    programs=functools.partial(programs, candidates),
  )


def usable(candidates: dict[str, Method], settings, num_layers: int, num_remove: int) -> dict[str, Method]:
  """The candidates that have enough layers to choose from; cosine_block always has."""
  return {name: m for name, m in candidates.items() if not m.why_not(settings, num_layers, num_remove)}


def why_not(settings, num_layers: int, num_remove: int) -> str:
  """Method.refuses: of the candidates one can always choose; but judging needs text of its own."""
  del num_layers, num_remove
  if settings.one_pass >= 2:
    return ''
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
  for name, entry in usable(candidates, context.settings, context.model.num_layers, num_remove).items():
    context.log.say(f'choosing layers by {name}')
    part = dataclasses.replace(context, score_steps=math.ceil(PARTS[name] * steps))
    found[name] = entry.choose(part, num_remove)
    if not np.isfinite(found[name].scores).all():
      raise InputError(
        'method', 'auto', f'some scores of {name} are not finite; check the weights, or use --dtype=float32.'
      )

  def say(c):
    return context.log.say(f'without layers {sorted(c.removed)}, which {c.method} chooses: loss {c.loss:.4f}')

  fit, held_out = context.batches[:steps], context.batches[steps : 2 * steps]
  removed = {name: choice.removed for name, choice in found.items()}
  judged = judge(context.model, removed, fit, held_out, context.mode, say)
  told = [dataclasses.asdict(c) | {'scores': found[c.method].scores} for c in judged]
  return Choice(judged[0].removed, about={'candidates': told})


def judge(
  model: Decoder,
  choices: dict[str, list[int]],
  fit: Batches,
  held_out: Batches,
  mode: Mode,
  log: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
  """The candidates, the best first. Where `absorb` cannot work on the model they are just removed.

  Args:
    choices: {method: layers to remove}; what several methods choose is judged once, under the first one's name.
    fit: tokens [B, T] that `absorb` reads.
    held_out: tokens [B, T] that the loss is taken on.
    log: called with each candidate when it has been judged.
  """
  candidates: list[Candidate] = []
  absorbs = not absorb.why_not(model.spec)
  for name, removed in choices.items():
    if any(set(removed) == set(other.removed) for other in candidates):
      continue
    pruned = absorb.absorb(model, removed, fit, mode, **QUICK) if absorbs else pruning.prune(model, removed)
    candidates.append(Candidate(name, removed, _loss(pruned, held_out, mode)))
    log(candidates[-1])
  if not np.isfinite([candidate.loss for candidate in candidates]).all():
    raise InputError('method', 'auto', 'some losses are not finite; look at the weights, or use --dtype=float32.')
  return sorted(candidates, key=lambda candidate: candidate.loss)


def _loss(model: Decoder, batches: Batches, mode: Mode) -> float:
  total, count = 0.0, 0.0
  for tokens_BT in batches:
    nll, n = map(hosts.to_host, losses.batch_nll(model, tokens_BT, None, mode))
    total, count = total + float(nll), count + float(n)
  return total / count


def programs(candidates: dict[str, Method], shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs: the candidates', then absorbing, removing and the loss of each."""
  settings, dense, L = shapes.settings, shapes.dense, shapes.num_layers
  entries = usable(candidates, settings, L, num_remove)
  steps = num_fitted(settings.removal.score_steps, settings.one_pass)
  found = []
  for name, entry in entries.items():
    calls = math.ceil(PARTS[name] * steps)
    found += [dataclasses.replace(p, calls=calls) for p in entry.programs(shapes, num_remove)]
  if not absorb.why_not(shapes.spec):
    found += [dataclasses.replace(p, calls=len(entries) * steps) for p in absorb.programs(shapes, **QUICK)]
  found.append(pruning.removal_program('judging, removing layers', dense, num_remove, keeps=True))
  pruned = pruning.cut_shapes(dense, num_remove)
  return [*found, _judging_program(shapes, pruned, device_bytes(dense.layers), len(entries) * steps)]


def _judging_program(shapes: Shapes, pruned: Decoder, beside: int, calls: int) -> Program:
  """The loss of a pruned model; the dense model's layers are beside it, all else is shared."""
  args = pruned, shapes.tokens_BT, None, shapes.mode
  flops, size = shapes.flops(pruned.num_layers), device_bytes(pruned)
  return Program(
    f'judging, {pruned.num_layers} layers', losses.batch_nll, args, flops, size, beside=beside, calls=calls
  )
