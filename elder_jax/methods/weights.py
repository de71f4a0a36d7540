"""Methods that score layers by their weights and gradients: taylor, magnitude (Shortened LLaMA).

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
  """Shortened LLaMA's Taylor+ (arXiv 2402.02834, section 3.1): a first-order estimate of the loss without a layer.

  Scores: Σ |w · ∂L/∂w| over all elements of a layer's weight matrices (four of attention, three of the MLP). This is the
  paper's formula; its code also adds the scales of the norms. L is the mean LM loss over all tokens of all batches. As in
  the released code, gradients are summed over the batches first, so that the score does not depend on the batch size. The
  layers with the lowest scores are removed together, but never the first KEPT_FIRST or the last KEPT_LAST.

  Memory: a float32 accumulator as large as the layers, and the gradients of one batch. Uses mode.remat.
  """
  candidates = range(KEPT_FIRST, model.num_layers - KEPT_LAST)
  weights, rest = partition(model, matrices_mask(model))
  # Sharded like the weights: a model that needs all devices must not have its sum on one.
  total = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32, device=w.sharding), weights)
  count = 0
  for tokens_BT in batches:
    total = add_gradients(total, weights, rest, tokens_BT, mode)
    count += num_predicted(tokens_BT)
  score_L = sum(to_host64(a_L) for a_L in _products(total, weights)) / count
  return Choice(lowest(score_L, candidates, num_remove), score_L.tolist())


def magnitude(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's Mag (arXiv 2402.02834, section 3.1), without its "+": any layer may be chosen.

  Scores: Σ |w| over a layer's weight matrices, without the scales of the norms. Removes the lowest. Reads no text.
  """
  weights, _ = partition(model, matrices_mask(model))
  score_L = sum(to_host64(a_L) for a_L in _magnitudes(weights))
  return Choice(lowest(score_L, range(model.num_layers), num_remove), score_L.tolist())


def matrices_mask(model: Decoder) -> Decoder:
  """Returns a mask like that of step.train_mask: True for the layers' matrices, False for norms, biases and the rest."""
  return jax.tree_util.tree_map_with_path(lambda path, _: is_layer_matrix(path), model)


@functools.partial(jax.jit, static_argnames='mode', donate_argnums=0)
def add_gradients(total, weights, rest, tokens_BT, mode: Mode):
  """Returns `total` plus the gradients of a batch's summed NLL with respect to `weights`, in float32."""

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
  """Returns Σ |w · g| per layer, one array [L] per matrix."""
  products = jax.tree.map(lambda g, w: jnp.abs(g * w.astype(jnp.float32)), gradients, weights)
  return sharding.replicate([_sum_over_all_but_layers(a) for a in jax.tree.leaves(products)])


@jax.jit
def _magnitudes(weights) -> list:
  """Returns Σ |w| per layer, one array [L] per matrix."""
  return sharding.replicate(
    [_sum_over_all_but_layers(jnp.abs(w.astype(jnp.float32))) for w in jax.tree.leaves(weights)]
  )


def programs_taylor(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs: the gradients of one batch, added to their float32 sum."""
  del num_remove
  weights, rest = partition(shapes.dense, matrices_mask(shapes.dense))
  total = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=w.sharding), weights)
  args = total, weights, rest, shapes.tokens_BT, shapes.mode
  gradients = device_bytes(total)
  return [score_program(shapes, 'choosing by taylor', add_gradients, *args, passes=3, gradients=gradients)]
