"""ReplaceMe (arXiv 2505.02819, section 2.2): replaces each removed block by a linear map folded into the layer before."""

import jax
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import get_layer
from elder_jax.recipes.streams import layer_at
from elder_jax.recipes.streams import prune_changed
from elder_jax.recipes.streams import put_layer
from elder_jax.recipes.streams import stream_programs
from elder_jax.recipes.streams import walk
from elder_jax.recipes.sums import product
from elder_jax.recipes.sums import rows
from elder_jax.recipes.sums import solve_once
from elder_jax.recipes.sums import spread


def start(context: Context, choice: Choice) -> Decoder:
  """Implements Recipe.start: fits a D × D map T after the MLP of the layer before each removed block.

  T = argmin Σ ‖a·T − (target − m)‖². a = f·W is the output of the MLP's down projection W, m the residual stream after
  attention, and the target the dense residual stream after the block. W becomes W·T. As published, all tokens have the
  same weight and there is no ridge penalty; if T is not unique, it has the least norm.
  """
  model = context.model
  current = jax.tree.map(lambda a: a, model)
  for l, end, x, t in walk(
    model, current, choice.removed, context.fitted, context.mode, progress=context.log.progress('fitting')
  ):
    t.advance(model, range(l, end))
    if end > l + 1:
      gram_DD, cross_DD = x.totals(_sums, current, l, beside=t)
      w_FD = get_layer(current.layers.w_down, l)
      change_DD = solve_once(_least_squares, gram_DD, cross_DD) / model.spec.residual_scale
      put_layer(current.layers.w_down, w_FD + w_FD @ change_DD, l)  # experts: the same map for each
  return prune_changed(current, choice.removed, model, context.free)


def _least_squares(gram_DD, cross_DD):
  # pinv, because the outputs of a few tokens do not span all D dimensions.
  return np.linalg.pinv(gram_DD, rcond=1e-12, hermitian=True) @ cross_DD


@jax.jit
def _sums(x_BTD, target_BTD, model: Decoder, l):
  """Returns (Σ a·aᵀ, Σ a·rᵀ): a is the output of layer l's down projection, r = target − output of the layer.

  The solution is T − 1.
  """
  block, attended_BTNH = layer_at(model, l, x_BTD)
  attn_BTD = block.attn_update(attended_BTNH, x_BTD)
  f_BTF, mid_BTD = block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD
  out_BTD = block.mlp_output(f_BTF)
  r_SD = rows(target_BTD) - rows(mid_BTD) - rows(block.mlp_update(f_BTF, mid_BTD))
  a_SD = rows(out_BTD if block.b_down is None else out_BTD - block.b_down[...].astype(out_BTD.dtype)[None, None])
  return spread((product(a_SD, a_SD), product(a_SD, r_SD)))


def why_not(spec: Spec) -> str:
  """Implements Recipe.refuses: '' if the MLP's update of the residual stream is linear in its down projection."""
  if spec.experts and spec.mlp_bias:
    return 'the experts of this family have biases, so no linear map can be folded into them; use --recipe=absorb.'
  if spec.block != 'post' and not spec.norms_output:
    return ''
  others = 'absorb, ' if spec.norms_output else ''
  return (
    'layers of this family normalise the output of their MLP, so no linear map can be folded into it; use '
    f'--recipe={others}prune_then_train, regularize or none.'
  )


def programs(shapes: Shapes) -> list[Program]:
  """Implements Recipe.programs."""
  return stream_programs(shapes, 'replace_linear', _sums, shapes.dense, np.int32(0))
