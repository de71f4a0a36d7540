"""Weights, tensor by tensor, from a checkpoint onto the devices."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.hf import safetensors_files
from elder_jax.hf.source import Source
from elder_jax.hf.table import Row
from elder_jax.hf.table import param_at
from elder_jax.hf.table import rows_of
from elder_jax.model.decoder import Decoder


def load_model(source: Source, dtype: str, shardings=None) -> Decoder:
  """Reads the weights tensor by tensor into arrays of `dtype` (gates: float32 ones), each straight to its place.

  A device's slice of a tensor is all that is read for it, so that of several hosts each reads its own byte ranges (of
  GGUF, whole tensors). Beside the arrays themselves the host holds a few copies of one tensor.

  Args:
    shardings: a Decoder of shardings (sharding.for_model), or None for the default device.
  """
  model = jax.eval_shape(lambda: Decoder(source.spec, source.num_layers, jax.random.key(0)))

  def where(path):
    return None if shardings is None else param_at(shardings, path).get_value()

  stacks = {}
  for row in rows_of(source.family, source.spec, source.num_layers):
    preemption.check()
    for part, piece in zip(row.parts, row.to_ours(source.read(row.name))):
      place, check = where(part.path), functools.partial(check_finite, source=source, row=row)
      if not row.index:
        stacks[part.path] = _on_devices(piece, dtype, place, check)
        continue
      if part.path not in stacks:
        stacks[part.path] = _zeros(param_at(model, part.path).get_value().shape, dtype, place)
      slice_place = None if place is None else NamedSharding(place.mesh, PartitionSpec(*place.spec[len(row.index) :]))
      array = _on_devices(piece, dtype, slice_place, check)
      stacks[part.path] = _put(stacks[part.path], array, tuple(map(np.int32, row.index)), place)
  for path, array in stacks.items():
    param_at(model, path).set_value(array)
  ones_L = np.ones(source.num_layers, np.float32)
  model.gate_L.set_value(_on_devices(ones_L, 'float32', where('gate_L'), lambda _: None))
  return model


def _on_devices(tensor: np.ndarray, dtype: str, place, check: Callable) -> jax.Array:
  """The tensor, which may be a view of a file, on the devices of `place`: each slice is read, checked and copied alone.

  Slices are copied as they lie in memory and turned on the device: a host takes ten times as long for a transposed copy.
  """
  as_stored = order_of([-stride for stride in tensor.strides])
  stored, back = tensor.transpose(as_stored), order_of(as_stored)

  def part(index):
    check(stored[index])
    return np.array(stored[index], jnp.dtype(dtype), order='C')  # a copy: an array on a CPU may go on using this memory

  if place is None:
    return turn(jax.device_put(part(...)), back, None)
  axes = [*place.spec, *[None] * (tensor.ndim - len(place.spec))]
  stored_place = NamedSharding(place.mesh, PartitionSpec(*(axes[a] for a in as_stored)))
  return turn(jax.make_array_from_callback(stored.shape, stored_place, part), back, place)


def order_of(keys) -> tuple[int, ...]:
  """What sorts the keys; of a permutation, its inverse."""
  return tuple(int(a) for a in np.argsort(keys, kind='stable'))


def turn(array, axes: tuple[int, ...], place):
  return array if axes == tuple(range(len(axes))) else _turned(array, axes, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _turned(array, axes: tuple[int, ...], place):
  turned = array.transpose(axes)
  return turned if place is None else jax.lax.with_sharding_constraint(turned, place)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, place):
  zeros = jnp.zeros(shape, dtype)
  return zeros if place is None else jax.lax.with_sharding_constraint(zeros, place)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(stack, piece, index, place):
  begin = (*index, *[np.int32(0)] * piece.ndim)
  stack = jax.lax.dynamic_update_slice(stack, piece.reshape((1,) * len(index) + piece.shape), begin)
  return stack if place is None else jax.lax.with_sharding_constraint(stack, place)


def check_finite(tensor: np.ndarray, source: Source, row: Row):
  if not safetensors_files.finite(tensor):
    raise InputError(
      'model', source.name, f'the tensor {row.name} holds NaN or infinite values; use another copy of the checkpoint.'
    )
