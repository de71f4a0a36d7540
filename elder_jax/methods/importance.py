"""How rival methods choose the layers to remove: for each a function from a model and calibration text to a Choice.

All see the dense model with its gates at 1. Text comes in batches of tokens that lie on the devices already; sums are
float32 within a batch and float64 over batches, and no more than one batch's hidden states are in memory.

x_l is what layer l reads, x_{l+1} what it writes, before the final norm. Ties go to the lower layer number.
Dimension names: see model.py; M is L + 1, the streams before, between and after the layers.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model import decoder
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.training import loop
from elder_jax.training import losses

# Shortened LLaMA's "+": the ends that its criteria never choose.
KEPT_FIRST, KEPT_LAST = 4, 2


@dataclasses.dataclass(frozen=True)
class Choice:
  """The layers to remove, 0-based.

  removed: in the order of their removal (a run of layers: ascending). A method that scores single layers chooses for
    fewer layers the first ones of this list.
  scores: one per layer, or one per start of a run of layers; empty where the method scores nothing. The unit is the
    method's own.
  """

  removed: list[int]
  scores: list[float]


Batches = Sequence[jax.Array]


def choose(method: str, model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """The layers that the method named by --method removes; with num_remove=0 none, and nothing is scored.

  Raises:
    InputError: the method has fewer layers to choose from, or its scores are not finite.
  """
  if method not in METHODS:
    raise InputError(f'--method={method}: is none of {", ".join(METHODS)}; choose one of these.')
  if not num_remove:
    return Choice([], [])
  choice = METHODS[method](model, num_remove, batches, mode, seed)
  if not np.isfinite(choice.scores).all():
    raise InputError(f'--method={method}: some scores are not finite; look at the weights, or use --dtype=float32.')
  return choice


def shortgpt(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """ShortGPT (arXiv 2403.03853, section 3): the layers of the lowest Block Influence, all at once.

  BI_l = 1 − mean over tokens of cos(x_l, x_{l+1}). Scores: BI per layer, in 0 … 2.
  """
  check('shortgpt', model.num_layers, num_remove)
  influence_L = 1 - _mean_cosines(model, batches, 1, mode)
  return Choice(_lowest(influence_L, range(model.num_layers), num_remove), influence_L.tolist())


def cosine_block(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """LLM-Streamline's layer pruning (arXiv 2403.19135, section 3.1): the run of n layers that turns the stream least.

  Scores: for each start l the mean over all tokens of cos(x_l, x_{l+n}); the run with the highest goes.
  """
  check('cosine_block', model.num_layers, num_remove)
  cosine_S = _mean_cosines(model, batches, num_remove, mode)
  start = int(np.argmax(cosine_S))
  return Choice(list(range(start, start + num_remove)), cosine_S.tolist())


def uidl(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887, section 3.2).

  Scores: for each start l the angular distance d(l, n) = arccos(cos(x_l, x_{l+n})) / π at the last token of each
  sequence, averaged over the sequences; in 0 … 1. The run of n layers with the least goes.
  """
  check('uidl', model.num_layers, num_remove)
  distance_S, count = 0.0, 0
  for tokens_BT in batches:
    distance_S = distance_S + _to_host(_angle_sums(model, tokens_BT, num_remove, mode))
    count += tokens_BT.shape[0]
  distance_S = distance_S / count
  start = int(np.argmin(distance_S))
  return Choice(list(range(start, start + num_remove)), distance_S.tolist())


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
  check('taylor', model.num_layers, num_remove)
  weights, rest = loop.partition(model, _matrices(model))
  # Where the weights lie, or a model that needs all devices would have its sum on one.
  total = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32, device=w.sharding), weights)
  count = 0
  for tokens_BT in batches:
    total = _add_gradients(total, weights, rest, tokens_BT, mode)
    count += _predicted(tokens_BT)
  score_L = sum(_to_host(a_L) for a_L in _products(total, weights)) / count
  return Choice(_lowest(score_L, candidates, num_remove), score_L.tolist())


def ppl(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's PPL (arXiv 2402.02834, section 3.1), with the ends kept as its released scripts do.

  Scores: the perplexity, exp of the mean over all predicted tokens of −log p, with this block alone removed. The lowest
  go, all at once, but never the first KEPT_FIRST and the last KEPT_LAST blocks.
  """
  candidates = range(KEPT_FIRST, model.num_layers - KEPT_LAST)
  check('ppl', model.num_layers, num_remove)
  ppl_L = np.exp(_loss_without_each(model, batches, np.ones(model.num_layers, bool), mode))
  return Choice(_lowest(ppl_L, candidates, num_remove), ppl_L.tolist())


def sleb(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """SLEB (arXiv 2402.09025, section 3.3, Algorithm 1): greedily the block whose removal costs the least LM loss.

  After each removal the blocks that are left are scored anew, without those that are gone. All blocks may be chosen,
  as in the paper; its released code spares the first and the last.

  Scores: the mean LM loss per token without the layer, as of the last time that it was scored: for a removed layer the
  loss right after its removal.
  """
  check('sleb', model.num_layers, num_remove)
  alive_L, score_L = np.ones(model.num_layers, bool), np.zeros(model.num_layers)
  removed = []
  for _ in range(num_remove):
    loss_L = _loss_without_each(model, batches, alive_L, mode)
    score_L[alive_L] = loss_L[alive_L]
    removed.append(int(np.argmin(loss_L)))
    alive_L[removed[-1]] = False
  return Choice(removed, score_L.tolist())


def magnitude(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Shortened LLaMA's Mag (arXiv 2402.02834, section 3.1), without its "+": all blocks may be chosen.

  Scores: Σ |w| over a block's weight matrices, the norms' scales apart. The lowest go. Reads no text.
  """
  check('magnitude', model.num_layers, num_remove)
  weights, _ = loop.partition(model, _matrices(model))
  score_L = sum(_to_host(a_L) for a_L in _magnitudes(weights))
  return Choice(_lowest(score_L, range(model.num_layers), num_remove), score_L.tolist())


def random(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """Layers in an order drawn by `seed`, the same for each num_remove. Scores: the layer's place in it. Reads no text."""
  check('random', model.num_layers, num_remove)
  order_L = np.random.default_rng(seed).permutation(model.num_layers)
  return Choice(order_L[:num_remove].tolist(), np.argsort(order_L).astype(float).tolist())


def last(model: Decoder, num_remove: int, batches: Batches, mode: Mode, seed: int = 0) -> Choice:
  """The final n layers but the very last (the simple strategy of arXiv 2403.17887, section 4.4). Scores nothing."""
  end = model.num_layers - 1
  check('last', model.num_layers, num_remove)
  return Choice(list(range(end - num_remove, end)), [])


METHODS: dict[str, Callable[[Decoder, int, Batches, Mode, int], Choice]] = {
  'shortgpt': shortgpt,
  'sleb': sleb,
  'uidl': uidl,
  'taylor': taylor,
  'ppl': ppl,
  'cosine_block': cosine_block,
  'magnitude': magnitude,
  'random': random,
  'last': last,
}


def num_candidates(method: str, num_layers: int) -> int:
  """Number of layers that the method chooses from."""
  spared = {'taylor': KEPT_FIRST + KEPT_LAST, 'ppl': KEPT_FIRST + KEPT_LAST, 'last': 1}.get(method, 0)
  return max(0, num_layers - spared)


def check(method: str, num_layers: int, num_remove: int):
  """Raises InputError where the method has fewer layers to choose from."""
  if num_remove > (candidates := num_candidates(method, num_layers)):
    raise InputError(
      f'--num_remove={num_remove}: --method={method} may choose from {candidates} of the {num_layers} '
      'layers; remove fewer (--num_remove or --ratio) or use another --method.'
    )


def program(method: str, model: Decoder, tokens_BT, num_remove: int, mode: Mode):
  """(jitted function, its arguments, forward passes that it takes) of a method's heaviest step; arrays may be abstract.

  None: the method runs no text through the model.
  """
  L = model.num_layers
  if method in ('shortgpt', 'cosine_block'):
    return _cosine_sums, (model, tokens_BT, 1 if method == 'shortgpt' else num_remove, mode), 1
  if method == 'uidl':
    return _angle_sums, (model, tokens_BT, num_remove, mode), 1
  if method == 'taylor':
    weights, rest = loop.partition(model, _matrices(model))
    total = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32, sharding=w.sharding), weights)
    return _add_gradients, (total, weights, rest, tokens_BT, mode), 3
  if method in ('ppl', 'sleb'):
    return _nll_without_each, (model, tokens_BT, np.ones(L, bool), mode), 1 + (L - 1) / 2
  return None


def _lowest(score_L: np.ndarray, candidates: Sequence[int], num_remove: int) -> list[int]:
  return sorted(candidates, key=lambda l: (score_L[l], l))[:num_remove]


def _to_host(array) -> np.ndarray:
  # Waits for the batch: were the next one started meanwhile, both would be in memory.
  return hosts.to_host(array).astype(np.float64)


def _predicted(tokens_BT) -> int:
  return tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)


# ---- Directions of the stream ----


def _stream(model: Decoder, tokens_BT, mode: Mode):
  """x_MBTD: what each layer reads, and what the last one writes."""
  gate_L = jnp.ones(model.num_layers, jnp.float32)
  x_BTD, _, x_LBTD = decoder.run_layers(
    model, decoder.embed(model, tokens_BT, mode), mode=mode, gate_L=gate_L, inputs=True
  )
  return jnp.concatenate([x_LBTD, x_BTD[None]])


def _dot(a_BTD, b_BTD):
  return jnp.sum(a_BTD.astype(jnp.float32) * b_BTD.astype(jnp.float32), -1)


@functools.partial(jax.jit, static_argnames=('n', 'mode'))
def _cosine_sums(model: Decoder, tokens_BT, n: int, mode: Mode):
  """For each start l of n layers, Σ over tokens of cos(x_l, x_{l+n})."""
  x_MBTD = _stream(model, tokens_BT, mode)

  def cosine_sum(l):
    a_BTD, b_BTD = x_MBTD[l], x_MBTD[l + n]
    # One root of both squares: exactly 1 where a = b.
    norms_BT = jnp.sqrt(_dot(a_BTD, a_BTD) * _dot(b_BTD, b_BTD))
    return jnp.sum(_dot(a_BTD, b_BTD) / jnp.maximum(norms_BT, jnp.finfo(jnp.float32).tiny))

  # One start at a time, so that only one float32 pair is in memory.
  return sharding.replicate(jax.lax.map(cosine_sum, jnp.arange(x_MBTD.shape[0] - n)))


def _mean_cosines(model: Decoder, batches: Batches, n: int, mode: Mode) -> np.ndarray:
  cosine_S, count = 0.0, 0
  for tokens_BT in batches:
    cosine_S = cosine_S + _to_host(_cosine_sums(model, tokens_BT, n, mode))
    count += tokens_BT.size
  return cosine_S / count


@functools.partial(jax.jit, static_argnames=('n', 'mode'))
def _angle_sums(model: Decoder, tokens_BT, n: int, mode: Mode):
  """For each start l of n layers, Σ over sequences of the angle between x_l and x_{l+n} at the last token, over π."""
  x_MBD = _stream(model, tokens_BT, mode)[:, :, -1].astype(jnp.float32)
  x_MBD = x_MBD / jnp.maximum(jnp.linalg.norm(x_MBD, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
  a_SBD, b_SBD = x_MBD[: x_MBD.shape[0] - n], x_MBD[n:]
  # arccos(a·b) of unit vectors, without arccos, which near 0 makes an error of 3e-4 of float32's last bit.
  angle_SB = 2 * jnp.arctan2(jnp.linalg.norm(a_SBD - b_SBD, axis=-1), jnp.linalg.norm(a_SBD + b_SBD, axis=-1))
  return sharding.replicate(jnp.sum(angle_SB, -1) / jnp.pi)


# ---- Losses without a layer ----


@functools.partial(jax.jit, static_argnames='mode')
def _nll_without_each(model: Decoder, tokens_BT, alive_L, mode: Mode):
  """nll_L: Σ over predicted tokens of −log p without layer l and without those not alive; inf for the latter.

  What lies below a layer is the same with and without it: one pass keeps each layer's input, and each candidate's
  pass starts there, half of the layers on average.
  """
  layer_L = jnp.arange(model.num_layers)
  gate_L = jnp.ones(model.num_layers, jnp.float32)
  _, _, x_LBTD = decoder.run_layers(model, decoder.embed(model, tokens_BT, mode), alive_L, mode, gate_L, inputs=True)

  def without(l):
    x_BTD, _ = decoder.run_layers(model, x_LBTD[l], alive_L & (layer_L > l), mode, gate_L)
    return losses.next_token_nll(model, decoder.final(model, x_BTD), tokens_BT)[0]

  nll = lambda l: jax.lax.cond(alive_L[l], without, lambda _: jnp.float32(jnp.inf), l)
  return sharding.replicate(jax.lax.map(nll, layer_L))


def _loss_without_each(model: Decoder, batches: Batches, alive_L: np.ndarray, mode: Mode) -> np.ndarray:
  """Mean LM loss per token, as in _nll_without_each."""
  nll_L, count = np.zeros(model.num_layers), 0
  for tokens_BT in batches:
    nll_L += _to_host(_nll_without_each(model, tokens_BT, alive_L, mode))
    count += _predicted(tokens_BT)
  return nll_L / count


# ---- Weights and their gradients ----


def _matrices(model: Decoder) -> Decoder:
  """A mask as train.mask's: True at the layers' matrices, whose names begin with w; norms' and biases' do not."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[0].name == 'layers' and path[1].name.startswith('w'), model
  )


@functools.partial(jax.jit, static_argnames='mode', donate_argnums=0)
def _add_gradients(total, weights, rest, tokens_BT, mode: Mode):
  """total + the gradients of a batch's summed nll with respect to `weights`, in float32."""

  def nll(weights):
    model = loop.combine(weights, rest)
    gate_L = jnp.ones(model.num_layers, jnp.float32)
    x_BTD, _ = decoder.forward(model, tokens_BT, mode=mode, gate_L=gate_L)
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
