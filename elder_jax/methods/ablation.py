"""Methods that remove a layer and look at the loss: ppl, sleb.

Dimension names: see model/decoder.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.methods.scores import KEPT_FIRST
from elder_jax.methods.scores import KEPT_LAST
from elder_jax.methods.scores import lowest
from elder_jax.methods.scores import score_program
from elder_jax.methods.scores import to_host64
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import final_norm
from elder_jax.model.decoder import run_layers
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.training import losses


def ppl(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's PPL (arXiv 2402.02834, section 3.1), with the ends kept as its released scripts do.

  Scores: the perplexity, exp of the mean over all predicted tokens of −log p, with this block alone removed. The lowest
  go, all at once, but never the first KEPT_FIRST and the last KEPT_LAST blocks.
  """
  candidates = range(KEPT_FIRST, model.num_layers - KEPT_LAST)
  ppl_L = np.exp(_loss_without_each(model, batches, np.ones(model.num_layers, bool), mode))
  return Choice(lowest(ppl_L, candidates, num_remove), ppl_L.tolist())


def sleb(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """SLEB (arXiv 2402.09025, section 3.3, Algorithm 1): greedily the block whose removal costs the least LM loss.

  After each removal the blocks that are left are scored anew, without those that are gone. All blocks may be chosen,
  as in the paper; its released code spares the first and the last.

  Scores: the mean LM loss per token without the layer, as of the last time that it was scored: for a removed layer the
  loss right after its removal.
  """
  alive_L, score_L = np.ones(model.num_layers, bool), np.zeros(model.num_layers)
  removed = []
  for _ in range(num_remove):
    loss_L = _loss_without_each(model, batches, alive_L, mode)
    score_L[alive_L] = loss_L[alive_L]
    removed.append(int(np.argmin(loss_L)))
    alive_L[removed[-1]] = False
  return Choice(removed, score_L.tolist())


def num_predicted(tokens_BT) -> int:
  return tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)


@functools.partial(jax.jit, static_argnames='mode')
def nll_without_each(model: Decoder, tokens_BT, alive_L, mode: Mode):
  """nll_L: Σ over predicted tokens of −log p without layer l and without those not alive; inf for the latter.

  What lies below a layer is the same with and without it: one pass keeps each layer's input, and each candidate's
  pass starts there, half of the layers on average.
  """
  layer_L = jnp.arange(model.num_layers)
  gate_L = jnp.ones(model.num_layers, jnp.float32)
  _, _, x_LBTD = run_layers(model, embed(model, tokens_BT, mode), alive_L, mode, gate_L, inputs=True)

  def without(l):
    x_BTD, _ = run_layers(model, x_LBTD[l], alive_L & (layer_L > l), mode, gate_L)
    return losses.next_token_nll(model, final_norm(model, x_BTD), tokens_BT)[0]

  def nll(l):
    return jax.lax.cond(alive_L[l], without, lambda _: jnp.float32(jnp.inf), l)

  return sharding.replicate(jax.lax.map(nll, layer_L))


def _loss_without_each(model: Decoder, batches: Batches, alive_L: np.ndarray, mode: Mode) -> np.ndarray:
  """Mean LM loss per token, as in _nll_without_each."""
  nll_L, count = np.zeros(model.num_layers), 0
  for tokens_BT in batches:
    nll_L += to_host64(nll_without_each(model, tokens_BT, alive_L, mode))
    count += num_predicted(tokens_BT)
  return nll_L / count


def programs_ppl(shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs: a pass that keeps each layer's input, and from there half of the layers on average for each."""
  del num_remove
  return [_program(shapes, 'ppl', 1)]


def programs_sleb(shapes: Shapes, num_remove: int) -> list[Program]:
  """Method.programs: as ppl, anew for each removed layer."""
  return [_program(shapes, 'sleb', num_remove)]


def _program(shapes: Shapes, method: str, rounds: int) -> Program:
  L = shapes.num_layers
  args = shapes.dense, shapes.tokens_BT, np.ones(L, bool), shapes.mode
  passes = 1 + (L - 1) / 2
  return score_program(shapes, f'choosing by {method}', nll_without_each, *args, passes=passes, rounds=rounds)
