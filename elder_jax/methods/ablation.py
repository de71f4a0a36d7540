"""Methods that score a layer by the loss without it: ppl (Shortened LLaMA) and sleb (SLEB).

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
  """Shortened LLaMA's PPL (arXiv 2402.02834, section 3.1). Like the released scripts, it keeps both ends.

  The score of a layer is the perplexity of the model without this layer: exp of the mean of −log p over all predicted
  tokens. The layers with the lowest scores are removed together, but never the first KEPT_FIRST or the last KEPT_LAST.
  """
  candidates = range(KEPT_FIRST, model.num_layers - KEPT_LAST)
  ppl_L = np.exp(_loss_without_each(model, batches, np.ones(model.num_layers, bool), mode))
  return Choice(lowest(ppl_L, candidates, num_remove), ppl_L.tolist())


def sleb(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """SLEB (arXiv 2402.09025, section 3.3, Algorithm 1): removes layers one by one, each time the cheapest in LM loss.

  After each removal it scores the remaining layers again. It may choose any layer, as in the paper; the released code
  never chooses the first or the last.

  The score of a layer is the mean LM loss per token without it, from the last time that it was scored. For a removed
  layer this is the loss right after its removal.
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
  """Returns nll_L: Σ of −log p over predicted tokens, without layer l and without the layers that are not alive.

  nll_L is inf for layers that are not alive. The hidden states below a layer do not depend on it. So one forward pass
  stores the input of every layer, and the pass of each candidate starts from there: half of the layers on average.
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
  """Mean LM loss per token; see nll_without_each."""
  nll_L, count = np.zeros(model.num_layers), 0
  for tokens_BT in batches:
    nll_L += to_host64(nll_without_each(model, tokens_BT, alive_L, mode))
    count += num_predicted(tokens_BT)
  return nll_L / count


def programs_ppl(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs: one full pass, then for each layer a pass through half of the layers on average."""
  del num_remove
  return [_program(shapes, 'ppl', 1)]


def programs_sleb(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs: the program of ppl, repeated for each removed layer."""
  return [_program(shapes, 'sleb', num_remove)]


def _program(shapes: Shapes, method: str, rounds: int) -> Program:
  L = shapes.num_layers
  args = shapes.dense, shapes.tokens_BT, np.ones(L, bool), shapes.mode
  passes = 1 + (L - 1) / 2
  return score_program(shapes, f'choosing by {method}', nll_without_each, *args, passes=passes, rounds=rounds)
