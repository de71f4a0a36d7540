"""Merging of layers into an earlier one by the sum of their parameter differences (LaCo, arXiv 2402.11187).

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
  """Returns the model with `merges` (see laco.Collapsed) applied and the merged layers removed."""
  merged = model
  for base, *members in merges:
    merged = merge_into(merged, base, layer_mask(members, model.num_layers))
  free = functools.partial(memory.free, spare=model)
  return pruning.prune(merged, [l for _, *members in merges for l in members], free)


def layer_mask(layers: Sequence[int], num_layers: int) -> np.ndarray:
  return np.isin(np.arange(num_layers), layers)


@jax.jit
def merge_into(model: Decoder, base, members_L):
  """Returns the model with θ_base + Σ over members_L of (θ_member − θ_base) in layer `base`. Removes no layer.

  This follows the formula of the paper. LaCo's notebook differs from it: it does not merge the scales of norms, and adds
  each difference to the layer as merged so far, which results in the last member.
  """

  def add_differences(a):
    a_32 = a.astype(jnp.float32)
    differences = jnp.where(members_L.reshape((-1,) + (1,) * (a.ndim - 1)), a_32 - a_32[base][None], 0)
    return a.at[base].set((a_32[base] + jnp.sum(differences, 0)).astype(a.dtype))

  model = jax.tree.map(lambda a: a, model)  # a new tree, so that the assignment does not change the argument
  model.layers = sharding.constrain_state(jax.tree.map(add_differences, model.layers))
  return model


def programs(shapes: Shapes) -> list[Program]:
  """The program of one merge, with the dense model and the result of the previous merge in memory."""
  dense = shapes.dense
  args = dense, np.int32(0), np.ones(shapes.num_layers, bool)
  return [Program('merging layers', merge_into, args, 0, device_bytes(dense), beside=device_bytes(dense.layers))]
