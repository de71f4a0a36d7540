"""What methods that score layers share."""

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

from elder_jax.devices import hosts
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

# Shortened LLaMA's "+": the ends that its criteria never choose.
KEPT_FIRST, KEPT_LAST = 4, 2


def lowest(score_L: np.ndarray, candidates: Sequence[int], num_remove: int) -> list[int]:
  return sorted(candidates, key=lambda l: (score_L[l], l))[:num_remove]


def to_host64(array) -> np.ndarray:
  # Waits for the batch: were the next one started meanwhile, both would be in memory.
  return hosts.to_host(array).astype(np.float64)


def by_scores(function: Callable) -> Callable[[Context, int], Choice]:
  """Method.choose of a function (model, num_remove, batches, mode, seed) -> Choice."""

  def choose(context: Context, num_remove: int) -> Choice:
    return function(context.model, num_remove, context.scored, context.mode, context.settings.data.seed)

  return choose


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
