"""The method laco (LaCo, arXiv 2402.11187): searches for layers that can be merged into an earlier one.

Dimension names: see model/decoder.py.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.merging import layer_mask
from elder_jax.recipes.merging import merge_into


class Collapsed(NamedTuple):
  """The result of `laco`."""

  model: Decoder  # without the merged layers; all gates are 1
  removed: list[int]  # layers of the original model that were merged away, in the order of the merges
  merges: list[tuple[int, ...]]  # (the layer merged into, the layers merged into it), in order
  cosine: float  # similarity between the outputs of this model and of the original
  threshold: float  # the first threshold that removed num_remove layers


def laco(
  model: Decoder,
  num_remove: int,
  batches: Sequence[jax.Array],
  mode: Mode,
  combine: int = 4,
  interval: int = 2,
  threshold: float = 0.95,
  step: float = 0.05,
  progress: Callable[[int, int, str], None] = lambda done, of, note: None,
) -> Collapsed:
  """LaCo (arXiv 2402.11187, sections 2.2 and 2.3, Algorithm 1), changed to remove exactly `num_remove` layers.

  A sweep starts near the output. At layer l it merges the C − 1 layers that follow into l,
    θ*_l = θ_l + Σ_{k=1 … C−1} (θ_{l+k} − θ_l),
  where θ is all parameters of a layer. The merge is kept if the cosine similarity between the outputs of the merged and the
  original model is above the threshold T. Then l decreases by the interval I, or further, until C layers and a last one can
  follow. Otherwise the merge is undone and l decreases by 1. The last layer is never merged away. The output is that of the
  final norm. The output of a sequence counts as one vector; the cosines are averaged over the sequences.

  Two changes to the paper: the last merge takes only as many layers as are still needed (and C is at most
  num_remove + 1), and T is searched for. A sweep that removes too few layers is repeated on the original model with the
  next lower value of threshold, threshold − step, … So T is the highest of these values that removes num_remove layers.

  Args:
    batches: Tokens [B, T], a few sequences. Every trial runs the original and the merged model on all of them.
    combine: C, the number of layers that become one.
    interval: I.
    progress: Called after each trial with the number of layers removed by this sweep, `num_remove`, and T.

  Raises InputError if no sweep can remove that many layers, or if an output is not finite.
  """
  L = model.num_layers
  combine = min(combine, num_remove + 1)
  if num_remove > most_removed(L, num_remove, combine, interval):
    raise InputError('method', 'laco', f'cannot merge away {num_remove} of {L} layers; remove fewer.')
  top = L - 1 - combine
  seen = {(): 1.0}  # all merges up to the tried one -> cosine; sweeps often start with the same merges
  while True:
    merged, merges, alive, l, refused = model, (), list(range(L)), top, []
    while l >= 0 and len(alive) > L - num_remove:
      group = tuple(alive[l : l + min(combine, 1 + len(alive) - (L - num_remove))])
      trial = (*merges, group)
      left = [k for k in alive if k not in group[1:]]
      if trial not in seen:
        seen[trial] = _similarity(model, merged, group, left, batches, mode)
      if seen[trial] > threshold:
        merged, merges, alive = merge_into(merged, group[0], layer_mask(group[1:], L)), trial, left
        l = min(l - interval, len(alive) - 1 - combine)
      else:
        refused.append(seen[trial])
        l -= 1
      progress(L - len(alive), num_remove, f'threshold {threshold:g}')
    if len(alive) == L - num_remove:
      break
    # The next lower threshold that accepts a merge which this one refused.
    while threshold >= max(refused):
      threshold = round(threshold - step, 6)
  removed = [k for group in merges for k in group[1:]]
  return Collapsed(pruning.prune(merged, removed), removed, list(merges), seen[merges], threshold)


def most_removed(num_layers: int, num_remove: int, combine: int = 4, interval: int = 2) -> int:
  """Returns how many layers one sweep of `laco` can remove when `num_remove` are requested."""
  combine = min(combine, num_remove + 1)
  top = num_layers - 1 - combine
  return (combine - 1) * (0 if top < 0 else top // max(interval, combine - 1) + 1)


def why_not(settings, num_layers: int, num_remove: int) -> str:
  """Implements Method.refuses."""
  del settings
  if num_remove <= (most := most_removed(num_layers, num_remove)):
    return ''
  return (
    f'can merge away at most {most} of the {num_layers} layers, not {num_remove}; remove fewer or use another --method.'
  )


def choose(context: Context, num_remove: int) -> Choice:
  """Implements Method.choose."""
  progress = context.log.progress('merging layers')
  collapsed = laco(context.model, num_remove, context.scored, context.mode, progress=progress)
  return Choice(collapsed.removed, about={'merges': [list(group) for group in collapsed.merges]})


def programs(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs: the original and a merged model on one batch."""
  del num_remove
  dense, all_L = shapes.dense, np.ones(shapes.num_layers, bool)
  args = (dense, dense, np.int32(0), all_L, all_L, shapes.tokens_BT, shapes.mode)
  size, layers = device_bytes(dense), device_bytes(dense.layers)
  return [
    Program('choosing by laco', _cosine_sum, args, 2 * shapes.flops(), size + layers, twice=size - layers, calls=20)
  ]


@functools.partial(jax.jit, static_argnames='mode')
def _cosine_sum(model: Decoder, merged: Decoder, base, members_L, alive_L, tokens_BT, mode: Mode):
  """Returns Σ over the sequences of the cosine between the outputs of `model` and of `merged` after one more merge."""
  gate_L = jnp.ones(model.num_layers, jnp.float32)
  a_BTD, _ = forward(model, tokens_BT, mode=mode, gate_L=gate_L)
  b_BTD, _ = forward(merge_into(merged, base, members_L), tokens_BT, alive_L, mode, gate_L)
  a_BTD, b_BTD = a_BTD.astype(jnp.float32), b_BTD.astype(jnp.float32)

  def dot(x_BTD, y_BTD):
    return jnp.sum(x_BTD * y_BTD, (1, 2))

  return sharding.replicate(jnp.sum(dot(a_BTD, b_BTD) / jnp.sqrt(dot(a_BTD, a_BTD) * dot(b_BTD, b_BTD))))


def _similarity(model, merged, group, left, batches, mode) -> float:
  total, count = 0.0, 0
  members_L, alive_L = layer_mask(group[1:], model.num_layers), layer_mask(left, model.num_layers)
  for tokens_BT in batches:
    total += float(_cosine_sum(model, merged, group[0], members_L, alive_L, tokens_BT, mode))
    count += tokens_BT.shape[0]
  if not math.isfinite(total):
    raise InputError(
      'method', 'laco', 'the output of a model is not finite; check the weights, or use --dtype=float32.'
    )
  return total / count
