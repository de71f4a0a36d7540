"""Prune&Comp (arXiv 2507.18212): what is below each cut is rescaled, so that the stream keeps its size over the gap."""

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
  """Recipe.start: the embedding and what the layers up to the cut add to the stream times α, from run to run upwards.

  α is the mean over channels k and sequences of Σ |Y_k| / Σ |X_k|, the sums over a sequence's tokens, X and Y the streams
  before and after the run of the model with the runs below it removed and compensated (released code). Norms read a
  stream times α as they read the stream, but for their epsilon. The paper's loop removes layer by layer and chooses anew
  each time; here --method has chosen, and the layers of a run go together.

  Where the head is the embedding, it would be scaled as well; the final norm is divided by α there.
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
    context.log.say(f'layers {l + 1}-{end - 1}: what is below them times {alpha:.4g}')
  passes.end()
  return prune_changed(current, choice.removed, model, context.free)


def scale(model: Decoder, last: int, alpha: float):
  """Multiplies the stream after layer `last`, and all before it, by alpha."""
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
  """Multiplies what a norm gives."""
  scale, offset = norm.scale.get_value(), norm.offset
  norm.scale.set_value(((scale.astype(jnp.float32) + offset) * factor - offset).astype(scale.dtype))
  _times(norm.bias, factor)


def _times(param, factor):
  """Multiplies a parameter; of a stack each layer by its own factor."""
  if param is not None:
    value = param.get_value()
    factor = factor.reshape(factor.shape + (1,) * (value.ndim - factor.ndim))
    param.set_value((value.astype(jnp.float32) * factor).astype(value.dtype))


def why_not(spec: Spec) -> str:
  """Recipe.refuses."""
  if spec.reads_normed and (spec.final_norm or not spec.tied):
    return ''
  return (
    'layers of this family read the stream without a norm, so that its size cannot be changed below a cut; use '
    '--recipe=prune_then_train or regularize, or none.'
  )


def programs(shapes: Shapes) -> list[Program]:
  """Recipe.programs."""
  return stream_programs(shapes, 'prune_comp', channel_ratios)
