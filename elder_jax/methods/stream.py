"""Methods that compare hidden states before and after layers: shortgpt, cosine_block, uidl.

x_l is the hidden state that layer l reads, x_{l+1} the one that it writes; x_L is taken before the final norm.
Dimension names: see model/decoder.py. M is L + 1, the number of hidden states x_0 … x_L.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.methods.scores import lowest
from elder_jax.methods.scores import score_program
from elder_jax.methods.scores import to_host64
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice


def shortgpt(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """ShortGPT (arXiv 2403.03853, section 3): removes the layers with the lowest block influence, all at once.

  BI_l = 1 − mean over tokens of cos(x_l, x_{l+1}). Scores: BI per layer, between 0 and 2.
  """
  influence_L = 1 - _mean_cosines(model, batches, 1, mode)
  return Choice(lowest(influence_L, range(model.num_layers), num_remove), influence_L.tolist())


def cosine_block(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """LLM-Streamline's layer pruning (arXiv 2403.19135, section 3.1), without its training of a replacement layer.

  Removes the contiguous block of n layers with the highest cosine similarity between its input and output. Scores: for
  each first layer l, the mean over all tokens of cos(x_l, x_{l+n}).
  """
  cosine_S = _mean_cosines(model, batches, num_remove, mode)
  start = int(np.argmax(cosine_S))
  return Choice(list(range(start, start + num_remove)), cosine_S.tolist())


def uidl(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887, section 3.2).

  Removes the contiguous block of n layers with the smallest angular distance between its input and output. Scores: for
  each first layer l, d(l, n) = arccos(cos(x_l, x_{l+n})) / π at the last token, averaged over the sequences; between 0
  and 1.
  """
  distance_S, count = 0.0, 0
  for tokens_BT in batches:
    distance_S = distance_S + to_host64(angle_sums(model, tokens_BT, num_remove, mode))
    count += tokens_BT.shape[0]
  distance_S = distance_S / count
  start = int(np.argmin(distance_S))
  return Choice(list(range(start, start + num_remove)), distance_S.tolist())


def _stream(model: Decoder, tokens_BT, mode: Mode):
  """Returns x_MBTD: the input of each layer and the output of the last one."""
  gate_L = jnp.ones(model.num_layers, jnp.float32)
  x_BTD, _, x_LBTD = run_layers(model, embed(model, tokens_BT, mode), mode=mode, gate_L=gate_L, inputs=True)
  return jnp.concatenate([x_LBTD, x_BTD[None]])


def _dot(a_BTD, b_BTD):
  return jnp.sum(a_BTD.astype(jnp.float32) * b_BTD.astype(jnp.float32), -1)


@functools.partial(jax.jit, static_argnames=('n', 'mode'))
def cosine_sums(model: Decoder, tokens_BT, n: int, mode: Mode):
  """Returns Σ over tokens of cos(x_l, x_{l+n}) for each first layer l of a block of n layers."""
  x_MBTD = _stream(model, tokens_BT, mode)

  def cosine_sum(l):
    a_BTD, b_BTD = x_MBTD[l], x_MBTD[l + n]
    # One square root of the product, so that the cosine is exactly 1 where a = b.
    norms_BT = jnp.sqrt(_dot(a_BTD, a_BTD) * _dot(b_BTD, b_BTD))
    return jnp.sum(_dot(a_BTD, b_BTD) / jnp.maximum(norms_BT, jnp.finfo(jnp.float32).tiny))

  # One block at a time, so that only two hidden states are in memory in float32.
  return sharding.replicate(jax.lax.map(cosine_sum, jnp.arange(x_MBTD.shape[0] - n)))


def _mean_cosines(model: Decoder, batches: Batches, n: int, mode: Mode) -> np.ndarray:
  cosine_S, count = 0.0, 0
  for tokens_BT in batches:
    cosine_S = cosine_S + to_host64(cosine_sums(model, tokens_BT, n, mode))
    count += tokens_BT.size
  return cosine_S / count


@functools.partial(jax.jit, static_argnames=('n', 'mode'))
def angle_sums(model: Decoder, tokens_BT, n: int, mode: Mode):
  """Returns Σ over sequences of the angle between x_l and x_{l+n} at the last token, divided by π, for each l."""
  x_MBD = _stream(model, tokens_BT, mode)[:, :, -1].astype(jnp.float32)
  x_MBD = x_MBD / jnp.maximum(jnp.linalg.norm(x_MBD, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  a_SBD, b_SBD = x_MBD[: x_MBD.shape[0] - n], x_MBD[n:]
  # atan2, because arccos turns one ulp near cos = 1 into an angle of 3e-4.
  angle_SB = 2 * jnp.arctan2(jnp.linalg.norm(a_SBD - b_SBD, axis=-1), jnp.linalg.norm(a_SBD + b_SBD, axis=-1))
  return sharding.replicate(jnp.sum(angle_SB, -1) / jnp.pi)


# ---- for the plan ----


def programs_shortgpt(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs."""
  del num_remove
  return [score_program(shapes, 'choosing by shortgpt', cosine_sums, shapes.dense, shapes.tokens_BT, 1, shapes.mode)]


def programs_cosine_block(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs; each number of layers has its own program."""
  name, args = _by_depth(shapes, 'cosine_block', num_remove)
  return [score_program(shapes, name, cosine_sums, *args)]


def programs_uidl(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs; each number of layers has its own program."""
  name, args = _by_depth(shapes, 'uidl', num_remove)
  return [score_program(shapes, name, angle_sums, *args)]


def _by_depth(shapes: Shapes, method: str, num_remove: int):
  depth = f', {num_remove} layers' if sum(n > 0 for n in shapes.num_removes) > 1 else ''
  return f'choosing by {method}{depth}', (shapes.dense, shapes.tokens_BT, num_remove, shapes.mode)
