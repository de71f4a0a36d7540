"""absorb: refits the layers around each removed block in closed form to compensate for it.

A removed block is a maximal sequence of consecutive removed layers. The layer before it is refitted to write the hidden
states that the dense model has after the block. The layers after it are refitted to write those that they write in the
dense model. Only output projections change (of attention and of the MLP), and the scale of a norm after them. So the
pruned model keeps the stock architecture and has no new tensor. No gradients are needed: the hidden states pass once
through the layers (recipes/streams.py), and each matrix takes one linear solve.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

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
from elder_jax.recipes.streams import prune_changed
from elder_jax.recipes.streams import put_layer
from elder_jax.recipes.streams import stream_programs
from elder_jax.recipes.streams import walk
from elder_jax.recipes.sums import product
from elder_jax.recipes.sums import ridge
from elder_jax.recipes.sums import rows
from elder_jax.recipes.sums import solve_once
from elder_jax.recipes.sums import spread
from elder_jax.recipes.sums import weights

# Chosen on validation text: docs/decisions/absorb.md.
RIDGE = 0.3  # ridge strength, as a multiple of the mean diagonal of a Gram matrix
AFTER = 2  # number of layers to refit after a removed block


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
  """Returns the pruned model, with the layers around each removed block refitted.

  Notation: x is the residual stream of the pruned model, t that of the dense model. In a layer, a is the input of
  attention's output projection Wo, f the input of the MLP's down projection W, and r the target minus the current output
  of the layer. Each change is the solution of a weighted ridge regression over all tokens; for W alone it is
    ΔW = (Σ w f·fᵀ + λI)⁻¹ Σ w f·rᵀ,  w = 1 / ‖target‖²,  λ = RIDGE · mean diagonal of Σ w f·fᵀ.
  The weights w make the error relative to the hidden state, which is what the norm of the next layer reads.

  The layer before a removed block has the dense residual stream after the block as its target:
    1. Wo and W are solved jointly, but only the change of Wo is applied, because it changes the input of W. (In parallel
       blocks it does not, and both changes are applied.)
    2. W is solved again, on the error that is left.
  Up to `after` layers follow each removed block and are refitted too, as many as there are before the next block:
    1. Wo, with the dense residual stream between attention and MLP as the target.
    2. W, with the dense residual stream after the layer as the target.
  In a mixture of experts f is the summed output of the experts, and W of every expert becomes W + W·ΔW with the same ΔW.
  If a norm follows the projections (sandwich blocks), only W and that norm are refitted (recipes/normed.py).

  Blocks are processed from the first layer upwards, each with the hidden states of the model refitted so far. A block that
  starts at layer 0 has no layer before it and is removed without a refit.

  Args:
    batches: Tokens [B, T] on the devices.
    log: Called for each block with (layer before it, its end, relative squared error before, and after).
    free: See pruning.prune. None: `model` is left unchanged.
    after: Number of layers to refit after each block.
    attention: Whether Wo is refitted as well.
    below, progress: See streams.walk.
  """
  current = jax.tree.map(lambda a: a, model)
  left = 0  # layers still to refit after the last block
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
  """Refits layer l, with input x, towards the target t. Returns the relative squared error before and after."""
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
  """Refits layer l, with input x, towards its output in `model`, with input t. Advances t through the layer."""
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
  """Adds the ridge solution to a projection of layer l. Returns the decrease of the squared error."""
  delta = solve_once(ridge, gram, cross, RIDGE)
  _add(current, weight, l, delta)
  return _won(delta, gram, cross)


def _change_both(current: Decoder, l: int, gram, cross) -> float:
  """Like `_change`, for both projections jointly. Changes that of the MLP only in parallel blocks."""
  wo, w_down = current.layers.wo, current.layers.w_down
  of_attention = current.spec.num_heads * current.spec.head_dim
  delta = solve_once(ridge, gram, cross, RIDGE, (of_attention, len(cross) - of_attention))
  _add(current, wo, l, delta[:of_attention])
  if current.spec.block == 'parallel':
    _add(current, w_down, l, delta[of_attention:])
  return _won(delta, gram, cross)


def _add(current: Decoder, weight, l: int, delta):
  """Adds `delta` to a projection of layer l. For experts, `delta` acts on their summed output."""
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


# ---- sums over the tokens of a batch, in float32 ----


@functools.partial(jax.jit, static_argnames='of')
def _sums(x_BTD, target_BTD, model: Decoder, l, of: str):
  """Returns (Σ w a·aᵀ, Σ w a·rᵀ, Σ w ‖r‖², Σ w ‖target‖²), where r = target − output of layer l.

  Args:
    of: What a is. 'down': the input of the MLP's down projection. 'both': the input of attention's output projection,
      followed by the input of the down projection.
  """
  block, attended_BTNH = layer_at(model, l, x_BTD)
  attn_BTD = block.attn_update(attended_BTNH, x_BTD)
  f_BTF, mid_BTD = block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD
  r_SD = rows(target_BTD) - rows(mid_BTD) - rows(block.mlp_update(f_BTF, mid_BTD))
  a_SA = rows(f_BTF) if of == 'down' else jnp.concatenate([rows(attended_BTNH), rows(f_BTF)], 1)
  return _weighted(a_SA, r_SD, rows(target_BTD))


@jax.jit
def _middle_sums(x_BTD, t_BTD, model: Decoder, current: Decoder, l):
  """Returns (Σ w a·aᵀ, Σ w a·rᵀ): a is the input of Wo in layer l of `current`, r its error after attention."""
  block, attended_BTNH = layer_at(current, l, x_BTD)
  dense_block, dense_BTNH = layer_at(model, l, t_BTD)
  target_SD = rows(t_BTD) + rows(dense_block.attn_update(dense_BTNH, t_BTD))
  r_SD = target_SD - rows(x_BTD) - rows(block.attn_update(attended_BTNH, x_BTD))
  return _weighted(rows(attended_BTNH), r_SD, target_SD)[:2]


def _weighted(a_SA, r_SD, target_SD):
  w_S1 = weights(target_SD)
  weighted_SA = a_SA * w_S1
  sums = product(weighted_SA, a_SA), product(weighted_SA, r_SD), jnp.sum(w_S1 * r_SD**2), jnp.sum(w_S1 * target_SD**2)
  return spread(sums)


# ---- the functions of the entries in RECIPES ----


def start_absorbed(context: Context, choice: Choice) -> Decoder:
  """Implements Recipe.start."""

  def say(layer: int, end: int, before: float, after: float):
    layers = f'layer {layer + 1}' if end == layer + 2 else f'layers {layer + 1}-{end - 1}'
    context.log.say(f'absorbed {layers} into layer {layer}: relative squared error {before:.3g} → {after:.3g}')

  progress = context.log.progress('fitting')
  return absorb(context.model, choice.removed, context.fitted, context.mode, say, context.free, progress=progress)


def why_not(spec: Spec) -> str:
  """Implements Recipe.refuses: '' if the layers' updates of the residual stream can be refitted in closed form."""
  if spec.block != 'post':
    return ''
  return (
    'layers of this family normalise the residual stream after their MLP, so nothing can be folded into the MLP; use '
    '--recipe=prune_then_train, regularize or none.'
  )


def programs(shapes: Shapes, after: int = AFTER, attention: bool = True) -> list[Program]:
  """Implements Recipe.programs. after, attention: see `absorb`."""
  at, layers = (shapes.dense, np.int32(0)), 1 + after
  if shapes.spec.norms_output:
    return stream_programs(shapes, 'absorb', normed.sums, *at, normed.no_scale(shapes), layers=3 * layers)
  if attention:
    return stream_programs(shapes, 'absorb', _sums, *at, 'both', layers=2 * layers)
  return stream_programs(shapes, 'absorb', _sums, *at, 'down', layers=layers)
