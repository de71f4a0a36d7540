"""Methods that look at nothing: random, last."""

import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice


def random(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Layers in an order drawn by `seed`, the same for each num_remove. Scores: the layer's place in it. Reads no text."""
  order_L = np.random.default_rng(seed).permutation(model.num_layers)
  return Choice(order_L[:num_remove].tolist(), np.argsort(order_L).astype(float).tolist())


def last(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """The final n layers but the very last (the simple strategy of arXiv 2403.17887, section 4.4). Scores nothing."""
  end = model.num_layers - 1
  return Choice(list(range(end - num_remove, end)), [])
