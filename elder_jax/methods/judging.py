"""The cost of removing given layers: the held-out loss after `absorb`.

The loss after plain removal ranks choices differently from the loss after training (docs/decisions/choosing.md).
Choices that leave the lowest layers unchanged share their hidden states there, which are computed once.
"""

from collections.abc import MutableMapping
from collections.abc import Sequence
import dataclasses
import functools

import jax
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import final_norm
from elder_jax.model.decoder import run_layers
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb
from elder_jax.recipes.context import Batches
from elder_jax.recipes.streams import Streams
from elder_jax.recipes.streams import cuts
from elder_jax.training import losses

# Only the most effective part of `absorb` runs before a comparison. It takes a fraction of the time.
QUICK = {'after': 0, 'attention': False}


class Judge:
  """Measures the held-out loss of choices, for one dense model and one text."""

  def __init__(self, model: Decoder, fit: Batches, held_out: Batches, mode: Mode, notes: MutableMapping | None = None):
    """Computes nothing yet.

    Args:
      fit: Batches of tokens [B, T] that `absorb` reads.
      held_out: Batches of tokens [B, T] that the loss is measured on.
      notes: Losses that are known already; new ones are added.
    """
    self._model, self._fit, self._held_out, self._mode = model, fit, list(held_out), mode
    self._notes = {} if notes is None else notes
    self._first, self._shared = 0, None

  def share(self, choices: Sequence[Sequence[int]]):
    """Computes the layers below all of these choices only once. Any other choice costs a pass from the first layer."""
    self._first = min((_untouched(self._model, removed) for removed in choices), default=0)
    self._shared = None

  def __call__(self, removed: Sequence[int]) -> float:
    """Returns the mean held-out LM loss per token after `absorb`, or after removal if `absorb` refuses the model."""
    name = f'loss without {sorted(removed)}'
    if name not in self._notes:
      self._notes[name] = self._loss(removed)
    return self._notes[name]

  def _below(self) -> tuple[int, Streams, Streams]:
    """Returns (the first layer that a choice may change, its inputs for the fitted and for the held-out text)."""
    if self._shared is None:
      fit, held_out = (Streams.at_the_bottom(self._model, b, self._mode) for b in (self._fit, self._held_out))
      self._shared = self._first, *(s.advance(self._model, range(self._first)) for s in (fit, held_out))
    return self._shared

  def _loss(self, removed: Sequence[int]) -> float:
    if not self._absorbs:
      return held_out_loss(pruning.prune(self._model, list(removed)), self._held_out, self._mode)
    begun = self._below() if 0 < self._first <= _untouched(self._model, removed) else None
    below = (begun[0], begun[1]) if begun else None
    pruned = absorb.absorb(self._model, removed, self._fit, self._mode, below=below, **QUICK)
    if begun is None:
      return held_out_loss(pruned, self._held_out, self._mode)
    alive_L = np.arange(pruned.num_layers) >= begun[0]
    return _mean(
      _nll_above(pruned, x_BTD, tokens_BT, alive_L, self._mode) for x_BTD, tokens_BT in zip(begun[2], self._held_out)
    )

  @property
  def _absorbs(self) -> bool:
    return not absorb.why_not(self._model.spec)


def held_out_loss(model: Decoder, held_out: Batches, mode: Mode) -> float:
  """Returns the mean LM loss per token."""
  return _mean(losses.batch_nll(model, tokens_BT, None, mode) for tokens_BT in held_out)


def _untouched(model: Decoder, removed: Sequence[int]) -> int:
  """Returns how many of the first layers a choice leaves unchanged."""
  found = cuts(model.num_layers, removed)
  return 0 if 0 in removed or not found else found[0][0]


def _mean(sums) -> float:
  total = np.zeros(2)
  for nll, count in sums:
    total += [float(hosts.to_host(nll)), float(hosts.to_host(count))]
  return float(total[0] / total[1])


@functools.partial(jax.jit, static_argnames='mode')
def _nll_above(model: Decoder, x_BTD, tokens_BT, alive_L, mode: Mode):
  x_BTD = final_norm(model, run_layers(model, x_BTD, alive_L, mode)[0])
  return sharding.replicate(losses.next_token_nll(model, x_BTD, tokens_BT))


def programs(shapes: Shapes, num_remove: int, choices: int, steps: int) -> list[Program]:
  """The programs that measure `choices` choices, with `steps` batches to fit on and as many held-out ones."""
  found, dense = [], shapes.dense
  if not absorb.why_not(shapes.spec):
    for p in absorb.programs(shapes, **QUICK):
      found.append(
        p if p.host else dataclasses.replace(p, calls=choices * p.calls * steps // shapes.settings.fitted_steps)
      )
  found.append(pruning.removal_program('judging, removing layers', dense, num_remove, keeps=True))
  pruned = pruning.cut_shapes(dense, num_remove)
  args, flops = (pruned, shapes.tokens_BT, None, shapes.mode), shapes.flops(pruned.num_layers)
  size, beside = device_bytes(pruned), device_bytes(dense.layers)  # both share embedding and head
  name = f'judging, {pruned.num_layers} layers'
  return [*found, Program(name, losses.batch_nll, args, flops, size, beside=beside, calls=choices * steps)]
