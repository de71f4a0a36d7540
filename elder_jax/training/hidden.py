"""Hidden-state distillation: trains the input of each layer towards the input of the same layer of the teacher.

Removing layers leaves an exact map between layers, so no projection between the two residual streams is needed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.spec import Mode


def teacher_streams(teacher: Decoder, tokens_BT, mode: Mode, kept_L=None):
  """The teacher's residual stream, with gates at 1 and without gradient.

  Args:
    teacher: the dense model.
    tokens_BT: int32.
    mode: of the computation.
    kept_L: int32, the teacher's layers whose inputs are returned; None: of none.

  Returns:
    (x_BTD after the last layer; x_LBTD, the inputs of the layers kept_L, or None).
  """
  ones_L = jnp.ones(teacher.num_layers, jnp.float32)
  inputs = kept_L is not None
  x_BTD, _, *read = run_layers(teacher, embed(teacher, tokens_BT, mode), mode=mode, gate_L=ones_L, inputs=inputs)
  # A copy of the kept layers' inputs, so that those of the whole teacher are freed before the model's layers run.
  x_LBTD = sharding.constrain_batch(read[0][kept_L], 1) if inputs else None
  return jax.lax.stop_gradient((x_BTD, x_LBTD))


def comparison(counted_BT) -> Callable:
  """`relative_error` in the form that decoder.run_layers requires."""

  # The gradient needs the two streams, which are in memory anyway. Without checkpoint, their difference is kept too.
  return jax.checkpoint(lambda x_BTD, y_BTD: relative_error(x_BTD, y_BTD, counted_BT))


def relative_error(x_BTD, y_BTD, counted_BT):
  """Σ over tokens of counted·‖x − y‖² / ‖y‖², a float32 scalar."""
  x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
  square_BT, scale_BT = jnp.sum((x_BTD - y_BTD) ** 2, -1), jnp.sum(y_BTD**2, -1)
  return jnp.sum(counted_BT * square_BT / jnp.maximum(scale_BT, 1e-12))


def mean_error(error_L, last, alive_L):
  """The mean error over the positions in depth that are compared: the inputs of the layers and the last output.

  Skipped layers do not count, nor does the input of the lowest layer that runs: it is not the output of a layer.

  Args:
    error_L: float32, error of each layer's input.
    last: float32 scalar, error of the last layer's output.
    alive_L: bool, False for skipped layers.
  """
  counted_L = (alive_L & (jnp.cumsum(alive_L) > 1)).astype(jnp.float32)
  return (jnp.sum(counted_L * error_L) + last) / (jnp.sum(counted_L) + 1)
