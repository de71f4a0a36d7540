"""The method swaps: local search from auto's choice by swaps of single layers that lower the held-out loss after absorb."""

import dataclasses
import math

import numpy as np

from elder_jax.methods import ablation
from elder_jax.methods import auto
from elder_jax.methods import judging
from elder_jax.methods.method import Method
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class SwapSettings(Settings):
  """Settings of the search."""

  tries: int = setting(
    32, 'Maximum number of swaps that --method=swaps tries; each one runs absorb.', flag='swap_tries', least=1
  )


def method(first: Method) -> Method:
  """Makes the entry of METHODS. first: the entry of auto; the search starts from its choice."""
  return Method(
    lambda context, num_remove: choose(first, context, num_remove),
    "auto's choice, improved by swaps of single layers that lower the held-out loss after absorb",
    nested=False,
    refuses=first.refuses,
    programs=lambda shapes, num_remove: programs(first, shapes, num_remove),
    reads=(*first.reads, 'swap_tries'),
  )


def choose(first: Method, context: Context, num_remove: int) -> Choice:
  """Implements Method.choose. `about` holds auto's candidates and the swaps made: [restored layer, removed layer, loss]."""
  start = first.choose(context, num_remove)
  steps = auto.num_fitted(context.settings.removal.score_steps, len(context.batches))
  fit, held_out, notes = (
    context.batches[:steps],
    context.batches[steps : 2 * steps],
    context.notes(f'swaps-{num_remove}'),
  )
  loss_of = judging.Judge(context.model, fit, held_out, context.mode, notes)
  if 'ppl' not in notes:
    notes['ppl'] = ablation.ppl(context.model, 1, fit[: math.ceil(steps / 4)], context.mode).scores
  cost_L = np.array(notes['ppl'])
  tries, progress = context.settings.swaps.tries, context.log.progress('swapping layers')
  removed, loss, made = sorted(start.removed), start.about['candidates'][0]['loss'], []
  loss_of.share([removed])
  seen = {tuple(removed)}  # the start; it does not count as a try
  while swap := _next(removed, cost_L, seen) if len(seen) <= tries else None:
    back, out, found = swap
    seen.add(tuple(found))
    of_found = loss_of(found)
    progress(len(seen) - 1, tries, f'best loss {min(loss, of_found):.4f}')
    if of_found < loss:
      context.log.say(f'remove layer {out} instead of layer {back}: held-out loss {loss:.4f} → {of_found:.4f}')
      removed, loss = found, of_found
      made.append([back, out, loss])
  return Choice(removed, about=start.about | {'swaps': made, 'tried': len(seen) - 1, 'loss': loss})


def _next(removed: list[int], cost_L: np.ndarray, seen: set[tuple[int, ...]]) -> tuple[int, int, list[int]] | None:
  """Returns the most promising unseen swap: (layer to restore, layer to remove, all removed layers after the swap).

  Swaps are ordered by the ratio of two perplexities: without the layer to remove, and without the layer to restore.
  """
  kept, log_L = [l for l in range(len(cost_L)) if l not in removed], np.log(cost_L)
  swaps = sorted((log_L[out] - log_L[back], back, out) for back in removed for out in kept)
  found = ((back, out, sorted({*removed, out} - {back})) for _, back, out in swaps)
  return next((swap for swap in found if tuple(swap[2]) not in seen), None)


def programs(first: Method, shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs."""
  steps = auto.num_fitted(shapes.settings.removal.score_steps, shapes.settings.one_pass)
  found = first.programs(shapes, num_remove) if first.programs else []
  judged = judging.programs(shapes, num_remove, shapes.settings.swaps.tries, steps)
  return [*found, *judged]
