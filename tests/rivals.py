"""Shared by the tests of methods that score layers: a tiny model, its batches, and `choose`."""

import numpy as np
import tiny
from tiny import tiny_spec

from elder_jax.methods import METHODS as ALL_METHODS
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Choice

SPEC = tiny_spec()
L = 9
BATCHES = list(np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 8, 9), np.int32))
METHODS = [name for name in ALL_METHODS if name not in ('auto', 'swaps', 'mask', 'elder', 'laco')]


def choose(method, model, num_remove, batches=BATCHES, mode=Mode(), seed=0) -> Choice:
  return tiny.choose(method, model, num_remove, batches, mode, seed)


def ascending(scores, candidates) -> list[int]:
  return sorted(candidates, key=lambda l: scores[l])


def middle(num_layers: int) -> range:
  """Returns the layers that Shortened LLaMA may remove: all but the first four and the last two."""
  return range(4, num_layers - 2)
