"""Prune&Comp (arXiv 2507.18212): rescales the weights below each gap, so that hidden states keep their magnitude."""

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.layers import Norm
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import Passes
from elder_jax.recipes.streams import Streams
from elder_jax.recipes.streams import channel_ratios
from elder_jax.recipes.streams import cuts
from elder_jax.recipes.streams import prune_changed
from elder_jax.recipes.streams import stream_programs


def start(context: Context, choice: Choice) -> Decoder:
  """Implements Recipe.start: at each gap, from the first layer upwards, multiplies everything below it by α.

  That is the embedding and the updates of the layers up to the gap. α is the mean over channels k and sequences of
    Σ |Y_k| / Σ |X_k|,
  with sums over the tokens of a sequence (released code). X and Y are the residual streams before and after the removed
  block, in the model whose lower blocks are removed and compensated already. Norms cancel a factor of their input, except
  for their epsilon. The paper removes one layer at a time and chooses again after each; here --method has chosen all
  layers, and the layers of a block are removed together.

  If the head is tied to the embedding, the scale of the final norm is divided by α to cancel the factor in the head.
  """
  model = context.model
  current, kept = jax.tree.map(lambda a: a, model), pruning.kept_layers(model.num_layers, choice.removed)
  gaps = cuts(model.num_layers, choice.removed)
  passes = Passes(context.log.progress('fitting'), max((end for _, end in gaps), default=0) + len(gaps))
  x, at = Streams.at_the_bottom(model, context.fitted, context.mode, passes), 0
  for l, end in gaps:
    x.advance(current, [k for k in kept if at <= k <= l])
    after = x.copy().advance(current, range(l + 1, end))
    ratio_D, sequences = x.totals(channel_ratios, beside=after)
    alpha = float(ratio_D.mean() / sequences)
    scale(current, l, alpha)
    x.map(lambda x_BTD, alpha=alpha: x_BTD * jnp.asarray(alpha, x_BTD.dtype))
    at = end
    context.log.say(f'scaled the weights below layers {l + 1}-{end - 1} by {alpha:.4g}')
  passes.end()
  return prune_changed(current, choice.removed, model, context.free)


def scale(model: Decoder, last: int, alpha: float):
  """Multiplies the residual stream after layer `last`, and before it, by alpha."""
  layers = model.layers
  factor_L = np.where(np.arange(model.num_layers) <= last, alpha, 1.0)
  for param in (model.embed, model.positions):
    _times(param, np.array(alpha))
  if model.spec.norms_output:
    for norm in (layers.post_attn_norm, layers.post_mlp_norm):
      _scale_norm(norm, factor_L[:, None])
  else:
    for param in (layers.wo, layers.bo, layers.w_down, layers.b_down):
      _times(param, factor_L)
  if model.spec.tied:
    _scale_norm(model.final_norm, np.array(1 / alpha))


def _scale_norm(norm: Norm, factor):
  """Multiplies the output of a norm."""
  scale, offset = norm.scale.get_value(), norm.offset
  norm.scale.set_value(((scale.astype(jnp.float32) + offset) * factor - offset).astype(scale.dtype))
  _times(norm.bias, factor)


def _times(param, factor):
  """Multiplies a parameter by a number, or the layers of a stacked parameter by one factor each."""
  if param is not None:
    value = param.get_value()
    factor = factor.reshape(factor.shape + (1,) * (value.ndim - factor.ndim))
    param.set_value((value.astype(jnp.float32) * factor).astype(value.dtype))


def why_not(spec: Spec) -> str:
  """Implements Recipe.refuses."""
  if spec.reads_normed and (spec.final_norm or not spec.tied):
    return ''
  return (
    'layers of this family read the residual stream without a norm, so it cannot be rescaled; use '
    '--recipe=prune_then_train, regularize or none.'
  )


def programs(shapes: Shapes) -> list[Program]:
  """Implements Recipe.programs."""
  return stream_programs(shapes, 'prune_comp', channel_ratios)
