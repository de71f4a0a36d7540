"""The weights of the loss's terms at a step: pure functions of it, computed on the host."""

from collections.abc import Sequence
import math

import numpy as np

from elder_jax.training.penalty import penalty_terms
from elder_jax.training.settings import TrainSettings


def distill_weight(settings: TrainSettings, step: int) -> float:
  """The weight of the KL divergence: from the first number in the first step to the last number in the last one."""
  start, end = settings.distill[0], settings.distill[-1]
  fraction = step / max(1, settings.steps - 1)
  return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def loss_terms(
  num_layers: int, layers: list[int], settings: TrainSettings, step: int, kept: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
  """The terms of losses.loss at a step. Which terms there are is the same in all steps, so that none recompiles.

  Args:
    layers: those that are penalised (penalty.penalty_terms).
    kept: for each layer of the model the teacher's layer that it was, 0-based; None: both have the same layers.
  """
  terms = penalty_terms(num_layers, layers, settings, step)
  if settings.distils:
    terms['distill'] = np.float32(distill_weight(settings, step))
  if settings.distill_hidden:
    terms['hidden'] = np.float32(settings.distill_hidden)
    terms['kept_L'] = np.arange(num_layers, dtype=np.int32) if kept is None else np.array(kept, np.int32)
  return terms
