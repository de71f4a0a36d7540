"""The weights of the terms of the loss at a step, computed on the host. They depend only on the step."""

from collections.abc import Sequence
import math

import numpy as np

from elder_jax.training.penalty import penalty_terms
from elder_jax.training.settings import TrainSettings


def distill_weight(settings: TrainSettings, step: int) -> float:
  """The weight of the KL divergence: goes along a cosine from settings.distill[0] to [-1], from first to last step."""
  start, end = settings.distill[0], settings.distill[-1]
  fraction = step / max(1, settings.steps - 1)
  return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def loss_terms(
  num_layers: int, layers: list[int], settings: TrainSettings, step: int, kept: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
  """The terms of losses.loss at a step. All steps have the same terms, so that none recompiles.

  Args:
    num_layers: L.
    layers: the penalised layers (penalty.penalty_terms).
    settings: of the training.
    step: 0-based.
    kept: the 0-based teacher layer that each layer of the model was; None: both have the same layers.
  """
  terms = penalty_terms(num_layers, layers, settings, step)
  if settings.distils:
    terms['distill'] = np.float32(distill_weight(settings, step))
  if settings.distill_hidden:
    terms['hidden'] = np.float32(settings.distill_hidden)
    terms['kept_L'] = np.arange(num_layers, dtype=np.int32) if kept is None else np.array(kept, np.int32)
  return terms
