"""Shared by the methods that score layers."""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from elder_jax.devices import hosts
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

# The "+" of Shortened LLaMA's criteria: the number of first and of last layers that they never choose.
KEPT_FIRST, KEPT_LAST = 4, 2


def lowest(score_L: np.ndarray, candidates: Sequence[int], num_remove: int) -> list[int]:
  return sorted(candidates, key=lambda l: (score_L[l], l))[:num_remove]


def to_host64(array) -> np.ndarray:
  # This waits for the batch. Otherwise the next batch would start and both would be in memory.
  return hosts.to_host(array).astype(np.float64)


def by_scores(function: Callable, passes: Callable[[int], int] = lambda num_remove: 1):
  """Makes Method.choose from a function (model, num_remove, batches, mode, seed) -> Choice.

  Args:
    passes: num_remove -> how often the function iterates over the batches.
  """

  def choose(context: Context, num_remove: int) -> Choice:
    progress = context.log.progress('scoring layers')
    batches = _ReportingBatches(context.scored, progress, passes(num_remove))
    return function(context.model, num_remove, batches, context.mode, context.settings.data.seed)

  return choose


class _ReportingBatches(Sequence):
  """Batches that report progress: how many were read, over all passes."""

  def __init__(self, batches: Batches, progress: Callable[[int, int], None], passes: int):
    self._batches, self._progress, self._of, self._done = batches, progress, passes * len(batches), 0

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, i):
    return self._batches[i]

  def __iter__(self):
    for batch in self._batches:
      yield batch
      self._done += 1
      self._progress(self._done, self._of)


def score_program(
  shapes: Shapes, name: str, call: Callable, *args, passes: float = 1, rounds: int = 1, gradients: int = 0
) -> Program:
  """The program that scores layers on one batch.

  Args:
    passes: Cost of one call, in forward passes.
    rounds: How often the method iterates over the batches.
    gradients: Bytes of gradients on each device.
  """
  calls = rounds * shapes.settings.removal.score_steps
  size = device_bytes(shapes.dense)
  return Program(name, call, args, passes * shapes.flops(), size, gradients=gradients, calls=calls)
