"""Removal of layers from the stacked arrays."""

from collections.abc import Callable
import functools

from flax import nnx
import jax
from jax.sharding import NamedSharding
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.layers import is_of_mixer
from elder_jax.model.program import Program
from elder_jax.model.program import device_bytes


def kept_layers(num_layers: int, removed: list[int]) -> list[int]:
  return [l for l in range(num_layers) if l not in set(removed)]


def prune(model: Decoder, removed: list[int], free: Callable | None = None) -> Decoder:
  """Returns the model without the layers `removed` (0-based). The others keep their order; all gates are 1.

  The logits are bit-identical to those of `model` with all gates at 1 and these layers skipped.

  Args:
    free: Called with each stacked array of `model` once it is cut. With memory.free the two models are never in memory at
      the same time.
  """
  kept = kept_layers(model.num_layers, removed)
  kept_K = np.array(kept, np.int32)

  def cut(param: nnx.Param):
    if not param.get_metadata()['axes'].startswith('L'):
      return param
    stack = param.get_value()
    place = getattr(stack, 'sharding', None)
    cut_stack = _take(stack, kept_K, place) if isinstance(place, NamedSharding) else stack[kept_K]
    if free:
      jax.block_until_ready(cut_stack)
      free(stack)
    return param.replace(cut_stack)

  model = jax.tree.map(cut, model, is_leaf=lambda x: isinstance(x, nnx.Variable))
  model.spec = model.layers.spec = model.spec.with_layers(kept)
  return with_gates(model, 1.0)


def cut_shapes(model: Decoder, num_remove: int) -> Decoder:
  """Returns an abstract model with `num_remove` fewer layers."""
  left = model.num_layers - num_remove

  def cut(p):
    a = p.get_value()
    stacked = p.get_metadata()['axes'].startswith('L')
    return p.replace(jax.ShapeDtypeStruct((left, *a.shape[1:]), a.dtype, sharding=a.sharding)) if stacked else p

  cut_model = jax.tree.map(cut, model, is_leaf=lambda a: isinstance(a, nnx.Variable))
  cut_model.spec = cut_model.layers.spec = model.spec.with_layers(list(range(left)))
  return cut_model


def removal_program(name: str, model: Decoder, num_remove: int, keeps: bool, beside: int = 0) -> Program:
  """The program of `prune` for an abstract model, one stacked array at a time.

  Args:
    keeps: Whether the model stays in memory. False: each stacked array is freed once it is cut.
    beside: Bytes per device of everything else in memory.
  """
  largest = max(jax.tree.leaves(model.layers), key=lambda a: a.size)
  kept_K = np.arange(model.num_layers - num_remove, dtype=np.int32)
  size, left = device_bytes(largest), 1 - num_remove / model.num_layers
  others = device_bytes(model) - size
  made = int(left * (device_bytes((model.layers, model.gate_L)) - size)) if keeps else 0
  return Program(name, _take, (largest, kept_K, largest.sharding), 0, size, beside=beside + others + made)


@functools.partial(jax.jit, static_argnums=2)
def _take(stack, kept_K, place):
  """Returns the kept layers; each device takes its own shard."""
  return jax.lax.with_sharding_constraint(stack[kept_K], place)


def with_gates(model: Decoder, value: float) -> Decoder:
  """Returns a copy of the tree (not of its arrays) with all gates set to `value`."""
  model = jax.tree.map(lambda a: a, model)
  gate_L = model.gate_L.get_value()
  model.gate_L.set_value(jax.numpy.full_like(gate_L, value))
  return model


def num_params(model: Decoder) -> int:
  """Returns the number of weights, without gates, and without the unused entries of layers with another mixer."""
  spare = 0
  for mixer in model.spec.mixer_L:
    others = (a for name, p in vars(model.layers).items() if is_of_mixer(name, 1 - mixer) for a in jax.tree.leaves(p))
    spare += sum(a.size // model.num_layers for a in others)
  return sum(a.size for a in jax.tree.leaves(model)) - model.num_layers - spare
