"""Loads weights, tensor by tensor, from a checkpoint onto the devices."""

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
  """Reads the weights into arrays of `dtype`, tensor by tensor; the gates are float32 ones.

  Each host reads only the byte ranges of its own devices' slices (of a GGUF file, whole tensors). In addition to the
  arrays, it holds a few copies of one tensor.

  Args:
    shardings: a Decoder of shardings (sharding.for_model), or None for the default device.

  Raises:
    InputError: a tensor holds NaN or infinite values, or its file became shorter.
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
  """Puts a tensor, which may be a view of a file, on the devices of `place`, slice by slice.

  Slices are copied in their memory order and transposed on the device: a transposed copy takes a host ten times as long.
  """
  as_stored = order_of([-stride for stride in tensor.strides])
  stored, back = tensor.transpose(as_stored), order_of(as_stored)

  def part(index):
    check(stored[index])
    return np.array(stored[index], jnp.dtype(dtype), order='C')  # a copy: on a CPU, the jax array may share the memory

  if place is None:
    return turn(jax.device_put(part(...)), back, None)
  axes = [*place.spec, *[None] * (tensor.ndim - len(place.spec))]
  stored_place = NamedSharding(place.mesh, PartitionSpec(*(axes[a] for a in as_stored)))
  return turn(jax.make_array_from_callback(stored.shape, stored_place, part), back, place)


def order_of(keys) -> tuple[int, ...]:
  """The permutation that sorts the keys. Of a permutation it is the inverse."""
  return tuple(int(a) for a in np.argsort(keys, kind='stable'))


def turn(array, axes: tuple[int, ...], place):
  """Transposes an array on its device; `place` is the sharding of the result, None for the default device."""
  return array if axes == tuple(range(len(axes))) else _transposed(array, axes, place)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _transposed(array, axes: tuple[int, ...], place):
  transposed = array.transpose(axes)
  return transposed if place is None else jax.lax.with_sharding_constraint(transposed, place)


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
  """Raises InputError if the tensor holds NaN or infinite values."""
  if not safetensors_files.finite(tensor):
    raise InputError(
      'model', source.name, f'the tensor {row.name} holds NaN or infinite values; use another copy of the checkpoint.'
    )
