"""Ghosted Layers (arXiv 2605.15491): a linear map at each gap that approximates the removed layers by least squares."""

import jax
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.recipes import patch
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import stream_programs
from elder_jax.recipes.sums import product
from elder_jax.recipes.sums import rows
from elder_jax.recipes.sums import solve_once
from elder_jax.recipes.sums import spread

EPSILON = 1e-6  # as in the released code


def start(context: Context, choice: Choice) -> Decoder:
  """Implements Recipe.start: x becomes x + x·M at each gap, with (XᵀX + εI) M = XᵀΔ.

  X is the dense residual stream before the removed block, Δ the update that the block adds to it.
  """
  return patch.start(context, choice, _sums, _solve)


def _solve(gram_DD, cross_DD) -> np.ndarray:
  return solve_once(lambda gram, cross: np.linalg.solve(gram + EPSILON * np.eye(len(gram)), cross), gram_DD, cross_DD)


@jax.jit
def _sums(x_BTD, y_BTD):
  """Returns (XᵀX, XᵀΔ)."""
  x_SD = rows(x_BTD)
  return spread((product(x_SD, x_SD), product(x_SD, rows(y_BTD) - x_SD)))


def programs(shapes: Shapes) -> list[Program]:
  """Implements Recipe.programs."""
  return stream_programs(shapes, 'ghosted', _sums)
