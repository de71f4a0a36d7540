"""Distillation of the stream: each layer of the model reads what the same layer of the teacher reads.

Removing layers leaves an exact map of layers, so that no projection is needed between the two streams.
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
  """(the teacher's stream x_BTD after its last layer, and x_LBTD, what its layers kept_L read, or None without these).

  Gates at 1; no gradient.
  """
  ones_L = jnp.ones(teacher.num_layers, jnp.float32)
  inputs = kept_L is not None
  x_BTD, _, *read = run_layers(teacher, embed(teacher, tokens_BT, mode), mode=mode, gate_L=ones_L, inputs=inputs)
  # A copy of the layers kept: those of the whole teacher go before the model's own layers run.
  x_LBTD = sharding.constrain_batch(read[0][kept_L], 1) if inputs else None
  return jax.lax.stop_gradient((x_BTD, x_LBTD))


def comparison(counted_BT) -> Callable:
  """`relative_error` as decoder.run_layers takes it."""

  # The gradient needs the two streams, which are there; without checkpoint their difference would be kept as well.
  return jax.checkpoint(lambda x_BTD, y_BTD: relative_error(x_BTD, y_BTD, counted_BT))


def relative_error(x_BTD, y_BTD, counted_BT):
  """Σ over tokens of counted·‖x − y‖² / ‖y‖², float32."""
  x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
  square_BT, scale_BT = jnp.sum((x_BTD - y_BTD) ** 2, -1), jnp.sum(y_BTD**2, -1)
  return jnp.sum(counted_BT * square_BT / jnp.maximum(scale_BT, 1e-12))


def mean_error(error_L, last, alive_L):
  """The mean over the places that are compared: what each layer reads, and what the last one writes.

  A place is the stream after a layer and its removed successors. What the lowest layer alive reads is no layer's output,
  and a layer that is skipped reads nothing.

  Args:
    error_L: of what each layer reads.
    last: of what the last layer writes.
  """
  counted_L = (alive_L & (jnp.cumsum(alive_L) > 1)).astype(jnp.float32)
  return (jnp.sum(counted_L * error_L) + last) / (jnp.sum(counted_L) + 1)
