"""Layers merged into an earlier one, as LaCo has it: the sum of their differences.

Dimension names: see model/decoder.py.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import memory
from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes


def merge(model: Decoder, merges: Sequence[Sequence[int]]) -> Decoder:
  """The model without the merged layers, by the `merges` that `laco` has found."""
  merged = model
  for base, *members in merges:
    merged = merge_into(merged, base, layer_mask(members, model.num_layers))
  free = functools.partial(memory.free, spare=model)
  return pruning.prune(merged, [l for _, *members in merges for l in members], free)


def layer_mask(layers: Sequence[int], num_layers: int) -> np.ndarray:
  return np.isin(np.arange(num_layers), layers)


@jax.jit
def merge_into(model: Decoder, base, members_L):
  """The model whose layer `base` has θ_base + Σ over members_L of (θ_member − θ_base); the members still stand.

  LaCo's notebook differs from its formula: it leaves the norms' scales alone, and adds each difference to the layer as
  merged so far, which gives the last member. This follows the formula.
  """

  def add_differences(a):
    a_32 = a.astype(jnp.float32)
    differences = jnp.where(members_L.reshape((-1,) + (1,) * (a.ndim - 1)), a_32 - a_32[base][None], 0)
    return a.at[base].set((a_32[base] + jnp.sum(differences, 0)).astype(a.dtype))

  model = jax.tree.map(lambda a: a, model)  # a new tree, whose layers can be put in place of the old
  model.layers = sharding.constrain_state(jax.tree.map(add_differences, model.layers))
  return model


def programs(shapes: Shapes) -> list[Program]:
  """A merge, with the merge before beside the dense model and this one's result."""
  dense = shapes.dense
  args = dense, np.int32(0), np.ones(shapes.num_layers, bool)
  return [Program('merging layers', merge_into, args, 0, device_bytes(dense), beside=device_bytes(dense.layers))]
