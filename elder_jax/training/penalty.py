"""The norm of a layer's update, which the recipe regularize penalises."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.model.spec import Mode
from elder_jax.training.settings import TrainSettings


def measure_of(mode: Mode) -> Callable:
  """`delta_norm` in the form that decoder.forward requires."""
  return functools.partial(delta_norm, penalty=mode.penalty, scale=mode.penalty_scale)


def delta_norm(d_BTD, x_BTD, penalty: str, scale: str):
  """The norm of a layer's update d = f(x) − x, one fp32 scalar (ELDeR, arXiv 2505.18232, section 3.3).

  The gradient at d = 0 is 0, not NaN.

  Args:
    d_BTD: the update.
    x_BTD: the input of the layer.
    penalty: l2: the unsquared Euclidean norm. l1: the sum of absolute values.
    scale: token: the mean over tokens of each token's norm. relative: the same, divided by the norm of the token's x,
      which gets no gradient. none: the norm of the whole [B, T, D].
  """
  d_BTD = d_BTD.astype(jnp.float32)

  def norm(a, axis):
    if penalty == 'l1':
      return jnp.sum(a * jnp.sign(a), axis)  # jnp.abs has the gradient 1 at 0
    squares = jnp.sum(a * a, axis)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)

  if scale == 'none':
    return norm(d_BTD, None)
  d_BT = norm(d_BTD, -1)
  if scale == 'relative':
    x_BT = norm(jax.lax.stop_gradient(x_BTD).astype(jnp.float32), -1)
    d_BT = d_BT / jnp.maximum(x_BT, 1e-6)
  return jnp.mean(d_BT)


def penalty_terms(num_layers: int, layers: list[int], settings: TrainSettings, step: int) -> dict[str, np.ndarray]:
  """The terms of losses.loss at a step: alive_L, gate_L, gate_weight_L and delta_weight_L. Depends only on the step.

  Joint (ELDeR, arXiv 2505.18232, section 3.3): λ2 on all of `layers` in every step. Sequential: the steps are divided
  among `layers` in the given order; a layer whose turn is over is skipped. Annealed: the gates of `layers` fall linearly
  to 0 over the fraction `anneal` of the steps (of each turn, if sequential).
  """
  alive_L = np.ones(num_layers, bool)
  weight_L = np.zeros(num_layers, np.float32)
  turns = len(layers) if settings.sequential else 1
  turn = min(turns - 1, step * turns // max(1, settings.steps)) if turns else 0
  first, end = (-(-settings.steps * t // max(1, turns)) for t in (turn, turn + 1))
  fraction = (step - first + 1) / max(1, end - first)
  now = layers[turn : turn + 1] if settings.sequential else layers
  weight_L[now] = settings.lambda2 * fraction**settings.lambda2_power
  if settings.sequential:
    alive_L[layers[:turn]] = False
  gate_L = np.ones(num_layers, np.float32)
  if settings.anneal:
    gate_L[now] = max(0.0, 1 - fraction / settings.anneal)
  zeros_L = np.zeros(num_layers, np.float32)
  return {'alive_L': alive_L, 'gate_L': gate_L, 'gate_weight_L': zeros_L, 'delta_weight_L': weight_L}
