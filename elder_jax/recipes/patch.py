"""A D × D matrix at each gap, for LinearPatch and Ghosted Layers. Stock checkpoints have no tensor for it."""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import Passes
from elder_jax.recipes.streams import Streams
from elder_jax.recipes.streams import cuts
from elder_jax.recipes.streams import prune_changed


def start(context: Context, choice: Choice, sums: Callable, solve: Callable[..., np.ndarray]) -> Decoder:
  """Returns the pruned model. The layer before each removed block writes y + y·M instead of y.

  M is fitted on hidden states of the dense model, as published. A block that starts at layer 0 has no layer before it and
  gets no matrix.

  Args:
    sums: (x_BTD before the block, x_BTD after it) of a batch -> arrays, which are summed over the batches.
    solve: These sums -> M_DD.
  """
  model, found, at = context.model, {}, 0
  gaps = cuts(model.num_layers, choice.removed)
  passes = Passes(context.log.progress('fitting'), max((end for _, end in gaps), default=0) + len(gaps))
  t = Streams.at_the_bottom(model, context.fitted, context.mode, passes)
  for l, end in gaps:
    before = t.advance(model, range(at, l + 1)).copy()
    t.advance(model, range(l + 1, end))
    found[l] = solve(*before.totals(sums, beside=t))
    at = end
    context.log.say(f'fitted a matrix in place of layers {l + 1}-{end - 1}')
  passes.end()
  return prune_changed(attach(model, found), choice.removed, model, context.free)


def attach(model: Decoder, patch_of: dict[int, np.ndarray]) -> Decoder:
  """Returns a copy of the tree with a matrix M_DD in each layer: patch_of[l], or 0, which has no effect."""
  D = model.spec.d_model
  stack_LDD = np.zeros((model.num_layers, D, D), np.float32)
  for l, patch_DD in patch_of.items():
    stack_LDD[l] = patch_DD
  stack = model.layers.w_down.get_value()
  home, value = getattr(stack, 'sharding', None), stack_LDD.astype(stack.dtype)
  if isinstance(home, NamedSharding):
    place = NamedSharding(home.mesh, sharding.spec('LDD'))
    return _with(model, jax.make_array_from_callback(value.shape, place, lambda index: value[index]))
  return _with(model, jnp.asarray(value))


def abstract(model: Decoder) -> Decoder:
  """`attach` for an abstract model."""
  stack, D = model.layers.w_down.get_value(), model.spec.d_model
  place = stack.sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, sharding.spec('LDD'))
  return _with(model, jax.ShapeDtypeStruct((model.num_layers, D, D), stack.dtype, sharding=place))


def _with(model: Decoder, stack_LDD) -> Decoder:
  model = jax.tree.map(lambda a: a, model)
  model.spec = model.layers.spec = dataclasses.replace(model.spec, patched=True)
  model.layers.patch = nnx.data(nnx.Param(stack_LDD, axes='LDD'))
  return model
