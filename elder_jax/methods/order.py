"""Methods that read neither text nor weights: random, last."""

import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice


def random(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Takes the first layers of a random order, which depends on `seed` only. The score of a layer is its rank there."""
  order_L = np.random.default_rng(seed).permutation(model.num_layers)
  return Choice(order_L[:num_remove].tolist(), np.argsort(order_L).astype(float).tolist())


def last(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Takes the last n layers before the final one (the simple strategy of arXiv 2403.17887, section 4.4). No scores."""
  end = model.num_layers - 1
  return Choice(list(range(end - num_remove, end)), [])
