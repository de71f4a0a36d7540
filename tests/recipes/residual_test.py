"""Closed forms with a residual multiplier (Granite): same result as with the multiplier folded into the weights."""

import jax
import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_decoder

from elder_jax.model.decoder import forward
from elder_jax.recipes import RECIPES
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

SCALE = 0.25  # exact in every dtype
BATCHES = list(np.random.default_rng(0).integers(0, 40, (3, 4, 16), np.int32))
PROJECTIONS = ('wo', 'w_down')


def both():
  """Returns (a model with the multiplier, one with the multiplier folded into its weights)."""
  factor, folded = tiny_decoder(residual_scale=SCALE), tiny_decoder()
  for name in PROJECTIONS:
    weight = getattr(folded.layers, name)
    weight.set_value(weight.get_value() * SCALE)
  return factor, folded


def test_both_models_compute_the_same():
  a, b = (forward(model, BATCHES[0])[0] for model in both())
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('recipe', ['absorb', 'replace_linear', 'prune_comp', 'none'])
def test_a_recipe_gives_the_same_result_for_both(recipe):
  config = config_of(num_sequences=12, batch_size=4, seq_len=16)
  starts = [RECIPES[recipe].start(Context(model, BATCHES, config), Choice([2, 3])) for model in both()]
  with jax.default_matmul_precision('highest'):
    a, b = (np.asarray(forward(model, BATCHES[0])[0]) for model in starts)
  np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())
  assert recipe == 'none' or np.abs(b - np.asarray(forward(both()[1], BATCHES[0])[0])).max() > 1e-3
  for name in PROJECTIONS:
    factor, folded = (np.asarray(getattr(model.layers, name).get_value()) for model in starts)
    np.testing.assert_allclose(SCALE * factor, folded, atol=2e-3 * np.abs(folded).max())
