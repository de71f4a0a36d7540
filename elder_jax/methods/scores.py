"""What methods that score layers share."""

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

# Shortened LLaMA's "+": the ends that its criteria never choose.
KEPT_FIRST, KEPT_LAST = 4, 2


def lowest(score_L: np.ndarray, candidates: Sequence[int], num_remove: int) -> list[int]:
  return sorted(candidates, key=lambda l: (score_L[l], l))[:num_remove]


def to_host64(array) -> np.ndarray:
  # Waits for the batch: were the next one started meanwhile, both would be in memory.
  return hosts.to_host(array).astype(np.float64)


def by_scores(function: Callable, passes: Callable[[int], int] = lambda num_remove: 1):
  """Method.choose of a function (model, num_remove, batches, mode, seed) -> Choice.

  Args:
    passes: how often it goes through the batches.
  """

  def choose(context: Context, num_remove: int) -> Choice:
    progress = context.log.progress('scoring layers')
    batches = _Told(context.scored, progress, passes(num_remove))
    return function(context.model, num_remove, batches, context.mode, context.settings.data.seed)

  return choose


class _Told(Sequence):
  """Batches, and how many of them were read in all passes."""

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
  """A program that scores layers on a batch.

  Args:
    passes: the forward passes that it takes.
    rounds: how often it goes through the batches.
  """
  calls = rounds * shapes.settings.removal.score_steps
  size = device_bytes(shapes.dense)
  return Program(name, call, args, passes * shapes.flops(), size, gradients=gradients, calls=calls)
