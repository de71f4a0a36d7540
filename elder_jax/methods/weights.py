"""Methods that look at the weights and their gradients: taylor, magnitude.

Dimension names: see model/decoder.py.
"""

import functools

import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.methods.ablation import num_predicted
from elder_jax.methods.scores import KEPT_FIRST
from elder_jax.methods.scores import KEPT_LAST
from elder_jax.methods.scores import lowest
from elder_jax.methods.scores import score_program
from elder_jax.methods.scores import to_host64
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.matrices import is_layer_matrix
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.training import losses
from elder_jax.training.step import combine
from elder_jax.training.step import partition


def taylor(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's Taylor+ (arXiv 2402.02834, section 3.1): first-order estimate of what a block's loss costs.

  Scores: Σ |w · ∂L/∂w| over all elements of a block's weight matrices (attention's four and the MLP's three; as in the
  paper's formula, not the norms' scales, which its code adds). L is the LM loss, the mean over all tokens of all
  batches: gradients are added up over the batches with their signs and only then multiplied and made absolute, as the
  released code does, so that the score does not depend on the cut into batches. The lowest go, all at once, but
  never the first KEPT_FIRST and the last KEPT_LAST blocks.

  Needs a float32 accumulator of the size of the blocks beside the gradients of one batch; mode.remat is observed.
  """
  candidates = range(KEPT_FIRST, model.num_layers - KEPT_LAST)
  weights, rest = partition(model, matrices_mask(model))
  # Where the weights lie, or a model that needs all devices would have its sum on one.
  total = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32, device=w.sharding), weights)
  count = 0
  for tokens_BT in batches:
    total = add_gradients(total, weights, rest, tokens_BT, mode)
    count += num_predicted(tokens_BT)
  score_L = sum(to_host64(a_L) for a_L in _products(total, weights)) / count
  return Choice(lowest(score_L, candidates, num_remove), score_L.tolist())


def magnitude(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's Mag (arXiv 2402.02834, section 3.1), without its "+": all blocks may be chosen.

  Scores: Σ |w| over a block's weight matrices, the norms' scales apart. The lowest go. Reads no text.
  """
  weights, _ = partition(model, matrices_mask(model))
  score_L = sum(to_host64(a_L) for a_L in _magnitudes(weights))
  return Choice(lowest(score_L, range(model.num_layers), num_remove), score_L.tolist())


def matrices_mask(model: Decoder) -> Decoder:
  """A mask as step.train_mask's: True at the layers' matrices; norms and biases are not among them."""
  return jax.tree_util.tree_map_with_path(lambda path, _: is_layer_matrix(path), model)


@functools.partial(jax.jit, static_argnames='mode', donate_argnums=0)
def add_gradients(total, weights, rest, tokens_BT, mode: Mode):
  """total + the gradients of a batch's summed nll with respect to `weights`, in float32."""

  def nll(weights):
    model = combine(weights, rest)
    gate_L = jnp.ones(model.num_layers, jnp.float32)
    x_BTD, _ = forward(model, tokens_BT, mode=mode, gate_L=gate_L)
    return losses.next_token_nll(model, x_BTD, tokens_BT)[0]

  gradients = sharding.constrain_state(jax.grad(nll)(weights))
  return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, gradients)


def _sum_over_all_but_layers(a):
  return jnp.sum(a.reshape(a.shape[0], -1), -1)


@jax.jit
def _products(gradients, weights) -> list:
  """Σ |w · g| per layer, for each matrix."""
  products = jax.tree.map(lambda g, w: jnp.abs(g * w.astype(jnp.float32)), gradients, weights)
  return sharding.replicate([_sum_over_all_but_layers(a) for a in jax.tree.leaves(products)])


@jax.jit
def _magnitudes(weights) -> list:
  """Σ |w| per layer, for each matrix."""
  return sharding.replicate(
    [_sum_over_all_but_layers(jnp.abs(w.astype(jnp.float32))) for w in jax.tree.leaves(weights)]
  )


def programs_taylor(shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs: gradients of a batch, added to their float32 sum."""
  del num_remove
  weights, rest = partition(shapes.dense, matrices_mask(shapes.dense))
  total = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=w.sharding), weights)
  args = total, weights, rest, shapes.tokens_BT, shapes.mode
  gradients = device_bytes(total)
  return [score_program(shapes, 'choosing by taylor', add_gradients, *args, passes=3, gradients=gradients)]
