"""LinearPatch (arXiv 2505.24680): rescales the hidden state at each gap, per channel of a Hadamard-rotated basis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.recipes import patch
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.hadamard import hadamard
from elder_jax.recipes.streams import channel_ratios
from elder_jax.recipes.streams import stream_programs


def start(context: Context, choice: Choice) -> Decoder:
  """Implements Recipe.start: x becomes x·HDHᵀ at each gap (section 3.2 and the released code).

  H is a Hadamard matrix divided by √d. D is diagonal; D_k is the mean over the sequences of
    Σ |(Y·H)_k| / Σ |(X·H)_k|,
  with sums over the tokens of a sequence. X and Y are the dense residual streams before and after the removed block.
  """
  H_DD = hadamard(context.model.spec.d_model)
  sums = functools.partial(_sums, H_DD=H_DD.astype(np.float32))

  def solve(ratio_D, sequences) -> np.ndarray:
    return H_DD @ np.diag(ratio_D / sequences) @ H_DD.T - np.eye(len(ratio_D))

  return patch.start(context, choice, sums, solve)


@jax.jit
def _sums(x_BTD, y_BTD, H_DD):
  """channel_ratios of the rotated hidden states."""

  def rotated(a_BTD):
    return jnp.einsum('BTD,DE->BTE', a_BTD.astype(jnp.float32), H_DD, precision=jax.lax.Precision.HIGHEST)

  return channel_ratios(rotated(x_BTD), rotated(y_BTD))


def why_not(spec: Spec) -> str:
  """Implements Recipe.refuses."""
  try:
    hadamard(spec.d_model)
  except ValueError:
    return (
      f'LinearPatch needs a Hadamard matrix of the model width, and none of order {spec.d_model} can be constructed here; '
      'use --recipe=ghosted or absorb.'
    )
  return ''


def programs(shapes: Shapes) -> list[Program]:
  """Implements Recipe.programs."""
  D = shapes.spec.d_model
  return stream_programs(shapes, 'linear_patch', _sums, np.zeros((D, D), np.float32))
