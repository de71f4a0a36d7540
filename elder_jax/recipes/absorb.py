"""Removal in closed form: layers around each removed run are refitted to make up for it.

The layer before a run writes what the run would write, as far as it can; the layers after it write what they would on the
stream of the whole model. Only what attention and the MLP end in changes, their out projections and the scale of a norm
behind, so that the pruned model is of the stock architecture, with no new tensor. Needs no gradients: the streams go once
through the layers (recipes/streams.py), and there is a linear solve for each matrix.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.recipes import normed
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import Streams
from elder_jax.recipes.streams import get_layer
from elder_jax.recipes.streams import layer_at
from elder_jax.recipes.streams import product
from elder_jax.recipes.streams import prune_changed
from elder_jax.recipes.streams import put_layer
from elder_jax.recipes.streams import ridge
from elder_jax.recipes.streams import rows
from elder_jax.recipes.streams import solve_once
from elder_jax.recipes.streams import stream_programs
from elder_jax.recipes.streams import walk
from elder_jax.recipes.streams import weights

# Chosen by trials on validation text: docs/decisions/absorb.md.
RIDGE = 0.3  # times the mean diagonal of a Gram matrix
AFTER = 2  # layers that are refitted after a run


def absorb(
  model: Decoder,
  removed: Sequence[int],
  batches: Batches,
  mode: Mode,
  log: Callable | None = None,
  free: Callable | None = None,
  after: int = AFTER,
  attention: bool = True,
  below: tuple[int, Streams] | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> Decoder:
  """The pruned model, in which the layers around the removed runs make up for these runs as far as they can.

  x is the pruned stream, t the dense one. Of a layer, a is what attention gives to its out projection Wo, f what the MLP
  gives to its down projection W, m the stream between the two. Each change is a ridge solution over all tokens,
    ΔW = (Σ w f·fᵀ + λI)⁻¹ Σ w f·rᵀ,  w = 1 / ‖target‖²,  λ = RIDGE · the mean diagonal of Σ w f·fᵀ:
  the error relative to the stream, as the next layer's norm reads it.

  Of the layer before a run the target is the dense stream after the run, r = target − x what the pruned one lacks:
    1. Wo by the joint solution of both projections, of which only the part of a is kept, since W reads what Wo changes
       (in parallel blocks it does not, and both parts are kept);
    2. W by its own solution on what step 1 leaves.
  Of each of the `after` layers that follow a run, as many as there are before the next:
    1. Wo with the dense stream between attention and MLP as the target;
    2. W with the dense stream after the layer as the target.
  Of experts f is what they give together, and W becomes W + W·ΔW in each: a change that is the same for all of them.
  Where a norm follows the projections (sandwich blocks) only W is refitted, in turns with that norm (recipes/normed.py).

  Runs are worked off upwards, each on the stream that those below it really leave. One that begins at layer 0 has no layer
  before it and is only removed.

  Args:
    batches: tokens [B, T] on the devices.
    log: called with (layer, the run's end, relative squared error before, after) for each run.
    free: of prune.prune; unset, `model` is left as it is.
    after: layers to refit after each run.
    attention: Wo is refitted, too.
    below, progress: of streams.walk.
  """
  current = jax.tree.map(lambda a: a, model)
  left = 0  # of the layers to refit after a run
  once = 1 if model.spec.block == 'parallel' else 1 + attention
  sums = normed.SUMS if model.spec.norms_output else once
  for l, end, x, t in walk(model, current, removed, batches, mode, after, below, progress, sums):
    if end > l + 1:
      t.advance(model, range(l, end))
      errors, left = _before_run(current, x, t, l, attention), after
      if log:
        log(l, end, *errors)
    elif left:
      _after_run(model, current, x, t, l, attention)
      left -= 1
    else:
      t.advance(model, [l])
  return prune_changed(current, removed, model, free)


def _before_run(current: Decoder, x: Streams, t: Streams, l: int, attention: bool) -> tuple[float, float]:
  """Refits layer l, which reads x and is to write t. Returns the relative squared error before and after."""
  block, layers, before = current.spec.block, current.layers, None
  if current.spec.norms_output:
    return normed.refit(current, x, t, l, normed.RIDGE)
  if attention:
    gram, cross, error, size = x.totals(_sums, current, l, 'both', beside=t)
    before, won = error / size, _change_both(current, l, gram, cross)
    if block == 'parallel':
      return before, (error - won) / size
  gram, cross, error, size = x.totals(_sums, current, l, 'down', beside=t)
  return error / size if before is None else before, (error - _change(current, layers.w_down, l, gram, cross)) / size


def _after_run(model: Decoder, current: Decoder, x: Streams, t: Streams, l: int, attention: bool):
  """Refits layer l, which reads x, to write what it writes in `model`, which reads t; takes t through it."""
  block = current.spec.block
  if attention and block == 'pre':
    gram, cross = x.totals(_middle_sums, model, current, l, beside=t)
    _change(current, current.layers.wo, l, gram, cross)
  t.advance(model, [l])
  if current.spec.norms_output:
    normed.refit(current, x, t, l, RIDGE)
  elif attention and block == 'parallel':
    gram, cross, *_ = x.totals(_sums, current, l, 'both', beside=t)
    _change_both(current, l, gram, cross)
  else:
    gram, cross, *_ = x.totals(_sums, current, l, 'down', beside=t)
    _change(current, current.layers.w_down, l, gram, cross)


def _change(current: Decoder, weight, l: int, gram, cross) -> float:
  """Adds the ridge solution to layer l of a projection. Returns by how much the squared error falls."""
  delta = solve_once(ridge, gram, cross, RIDGE)
  _add(current, weight, l, delta)
  return _won(delta, gram, cross)


def _change_both(current: Decoder, l: int, gram, cross) -> float:
  """The same of both projections; of the MLP's only in parallel blocks, where it reads nothing of attention's."""
  wo, w_down = current.layers.wo, current.layers.w_down
  of_attention = current.spec.num_heads * current.spec.head_dim
  delta = solve_once(ridge, gram, cross, RIDGE, (of_attention, len(cross) - of_attention))
  _add(current, wo, l, delta[:of_attention])
  if current.spec.block == 'parallel':
    _add(current, w_down, l, delta[of_attention:])
  return _won(delta, gram, cross)


def _add(current: Decoder, weight, l: int, delta):
  """Changes what a layer adds to the stream by `delta` times what a projection reads, or experts give."""
  value, delta = get_layer(weight, l), delta / current.spec.residual_scale
  if not (current.spec.experts and weight is current.layers.w_down):
    put_layer(weight, value + delta.reshape(value.shape), l)
    return
  put_layer(weight, value + value @ delta, l)
  if (bias := current.layers.b_down) is not None:
    bias_ED = get_layer(bias, l)
    put_layer(bias, bias_ED + bias_ED @ delta, l)


def _won(delta, gram, cross) -> float:
  return 2 * np.sum(delta * cross) - np.sum(delta * (gram @ delta))


# ---- sums over the tokens of a batch, float32 ----


@functools.partial(jax.jit, static_argnames='of')
def _sums(x_BTD, target_BTD, model: Decoder, l, of: str):
  """(Σ w a·aᵀ, Σ w a·rᵀ, Σ w ‖r‖², Σ w ‖target‖²), r = target − what layer l writes.

  Args:
    of: what a is: `down`, the features of the MLP; `both`, those of attention and then those of the MLP.
  """
  block, attended_BTNH = layer_at(model, l, x_BTD)
  attn_BTD = block.attn_update(attended_BTNH, x_BTD)
  f_BTF, mid_BTD = block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD
  r_SD = rows(target_BTD) - rows(mid_BTD) - rows(block.mlp_update(f_BTF, mid_BTD))
  a_SA = rows(f_BTF) if of == 'down' else jnp.concatenate([rows(attended_BTNH), rows(f_BTF)], 1)
  return _weighted(a_SA, r_SD, rows(target_BTD))


@jax.jit
def _middle_sums(x_BTD, t_BTD, model: Decoder, current: Decoder, l):
  """(Σ w a·aᵀ, Σ w a·rᵀ), a what attention gives in layer l of `current`, r what its stream after attention lacks."""
  block, attended_BTNH = layer_at(current, l, x_BTD)
  dense_block, dense_BTNH = layer_at(model, l, t_BTD)
  target_SD = rows(t_BTD) + rows(dense_block.attn_update(dense_BTNH, t_BTD))
  r_SD = target_SD - rows(x_BTD) - rows(block.attn_update(attended_BTNH, x_BTD))
  return _weighted(rows(attended_BTNH), r_SD, target_SD)[:2]


def _weighted(a_SA, r_SD, target_SD):
  w_S1 = weights(target_SD)
  weighted_SA = a_SA * w_S1
  sums = product(weighted_SA, a_SA), product(weighted_SA, r_SD), jnp.sum(w_S1 * r_SD**2), jnp.sum(w_S1 * target_SD**2)
  return sharding.replicate(sums)


# ---- the entries ----


def start_absorbed(context: Context, choice: Choice) -> Decoder:
  """Recipe.start."""

  def say(layer: int, end: int, before: float, after: float):
    layers = f'layer {layer + 1}' if end == layer + 2 else f'layers {layer + 1}-{end - 1}'
    context.log.say(f'absorbed {layers} into layer {layer}: relative squared error {before:.3g} → {after:.3g}')

  progress = context.log.progress('fitting')
  return absorb(context.model, choice.removed, context.fitted, context.mode, say, context.free, progress=progress)


def why_not(spec: Spec) -> str:
  """Recipe.refuses: '' where what layers add to the stream can be refitted in closed form."""
  if spec.block != 'post':
    return ''
  return (
    'layers of this family normalise the stream after their MLP, so that nothing can be folded into it; use '
    '--recipe=prune_then_train or regularize, or none.'
  )


def programs(shapes: Shapes, after: int = AFTER, attention: bool = True) -> list[Program]:
  """Recipe.programs; arguments as for `absorb`."""
  at, layers = (shapes.dense, np.int32(0)), 1 + after
  if shapes.spec.norms_output:
    return stream_programs(shapes, 'absorb', normed.sums, *at, normed.no_scale(shapes), layers=3 * layers)
  if attention:
    return stream_programs(shapes, 'absorb', _sums, *at, 'both', layers=2 * layers)
  return stream_programs(shapes, 'absorb', _sums, *at, 'down', layers=layers)
