"""The method swaps: a search from auto's choice, one layer for another, each swap judged by the loss after absorbing."""

from collections.abc import Iterator
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
  """How long swaps are tried."""

  tries: int = setting(
    32, 'Swaps of one layer that --method=swaps judges at most, each by absorbing anew.', flag='swap_tries', least=1
  )


def method(first: Method) -> Method:
  """The entry of the table; `first` is auto's, whose choice the search begins with."""
  return Method(
    lambda context, num_remove: choose(first, context, num_remove),
    "auto's choice, in which single layers are swapped as long as the loss after absorbing falls",
    nested=False,
    refuses=first.refuses,
    programs=lambda shapes, num_remove: programs(first, shapes, num_remove),
    reads=(*first.reads, 'swap_tries'),
  )


def choose(first: Method, context: Context, num_remove: int) -> Choice:
  """Method.choose. `about` has auto's candidates and the swaps that were made: [layer back, layer out, loss]."""
  start = first.choose(context, num_remove)
  steps = auto.num_fitted(context.settings.removal.score_steps, len(context.batches))
  loss_of = judging.Judge(context.model, context.batches[:steps], context.batches[steps : 2 * steps], context.mode)
  quarter = context.batches[: math.ceil(steps / 4)]
  cost_L = ablation.ppl(context.model, 1, quarter, context.mode).scores
  tries, progress = context.settings.swaps.tries, context.log.progress('swapping layers')
  removed, loss, made, left = sorted(start.removed), start.about['candidates'][0]['loss'], [], tries
  loss_of.share([removed])
  seen, better = {tuple(removed)}, True
  while better and left:
    better = False
    for back, out in _swaps(removed, np.array(cost_L)):
      found = sorted({*removed, out} - {back})
      if tuple(found) in seen:
        continue
      seen.add(tuple(found))
      left -= 1
      of_found = loss_of(found)
      progress(tries - left, tries, f'best loss {min(loss, of_found):.4f}')
      if of_found < loss:
        context.log.say(f'layer {out} instead of layer {back}: loss {loss:.4f} → {of_found:.4f}')
        removed, loss, better = found, of_found, True
        made.append([back, out, loss])
        break
      if not left:
        break
  return Choice(removed, about=start.about | {'swaps': made, 'tried': tries - left, 'loss': loss})


def _swaps(removed: list[int], cost_L: np.ndarray) -> Iterator[tuple[int, int]]:
  """(layer to put back, layer to take out), the most promising first: by the perplexity without each of them alone."""
  log_L = np.log(cost_L)
  kept = [l for l in range(len(cost_L)) if l not in removed]
  pairs = [(back, out) for back in removed for out in kept]
  return iter(sorted(pairs, key=lambda pair: (log_L[pair[1]] - log_L[pair[0]], pair)))


def programs(first: Method, shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs."""
  steps = auto.num_fitted(shapes.settings.removal.score_steps, shapes.settings.one_pass)
  found = first.programs(shapes, num_remove) if first.programs else []
  judged = judging.programs(shapes, num_remove, shapes.settings.swaps.tries, steps)
  return [*found, *judged]
