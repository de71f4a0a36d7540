"""Hidden states of the whole calibration data, advanced layer by layer. All closed forms are fitted on them.

A closed form reads one layer at a time. In between, the hidden states of all batches wait in host memory. So every layer
is computed once, no matter how many layers are refitted.

Dimension names: see model/decoder.py. S is all tokens of a batch.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.devices import preemption
from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.attention import kinds
from elder_jax.model.attention import mixer_of
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.layers import Block
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.sums import add
from elder_jax.recipes.sums import on_host
from elder_jax.recipes.sums import solver_host_bytes
from elder_jax.recipes.sums import spread
from elder_jax.recipes.sums import total_device_bytes

# The fraction of its layers that a model's hidden states pass: none are needed after the last changed layer. The layers
# are not known when the plan is made; this is for a block in the middle.
PASSED = 0.6


class Passes:
  """Reports the progress of a fit. One pass is the whole text through one layer, or through the sums of one layer."""

  def __init__(self, progress: Callable[[int, int], None] = lambda done, of: None, of: int = 0):
    self._progress, self._of, self._done = progress, of, 0.0

  def add(self, passes: float):
    self._done += passes
    self._progress(min(int(self._done + 1e-6), self._of - 1), self._of)

  def end(self):
    if self._of:
      self._progress(self._of, self._of)


class Streams:
  """The hidden states x_BTD of all batches at one place of a model, in the computation dtype."""

  def __init__(self, mode: Mode, parts: list[jax.Array], passes: Passes = Passes()):
    self.mode, self._parts, self._passes = mode, parts, passes

  @classmethod
  def at_the_bottom(cls, model: Decoder, batches: Batches, mode: Mode, passes: Passes = Passes()) -> 'Streams':
    """Returns the input of layer 0."""
    return cls(mode, [_to_host(_embed(model, tokens_BT, mode)) for tokens_BT in batches], passes)

  def copy(self) -> 'Streams':
    """Returns the same hidden states as a new object, which can be advanced independently."""
    return Streams(self.mode, list(self._parts), self._passes)

  def __iter__(self) -> Iterator[jax.Array]:
    return (_to_device(x_BTD) for x_BTD in _stoppable(self._parts))

  def advance(self, model: Decoder, layers: range | list[int]) -> 'Streams':
    """Runs the hidden states through these layers and returns self. They must be the input of the first of them."""
    if layers:
      alive_L = np.isin(np.arange(model.num_layers), layers)
      self.map(lambda x_BTD: _advance(model, x_BTD, alive_L, self.mode), len(layers))
    return self

  def map(self, f: Callable[[jax.Array], jax.Array], passes: int = 0):
    """Replaces each x_BTD by f(x_BTD). passes: the cost, for the progress."""
    for i, x_BTD in enumerate(self):
      self._parts[i] = _to_host(f(x_BTD))
      self._passes.add(passes / len(self._parts))

  def totals(self, sums: Callable, *args, beside: 'Streams | None' = None, part: float = 1.0) -> list[np.ndarray]:
    """Returns the sum over the batches, in float64, of the arrays of sums(x_BTD, y_BTD, *args).

    Args:
      sums: Returns a tuple of float32 arrays for a batch, sharded by `spread`.
      beside: Where y_BTD comes from; None: these hidden states themselves.
      part: Fraction of the batches to read, from the first one.
    """
    pairs, total = zip(self, self if beside is None else beside), None
    for x_BTD, other_BTD in itertools.islice(pairs, math.ceil(part * len(self._parts))):
      total = add(total, sums(x_BTD, other_BTD, *args))
      self._passes.add(1 / len(self._parts))
    return on_host(total)


def _stoppable(items):
  for item in items:
    preemption.check()
    yield item


def _to_host(x_BTD):
  """Moves an array from device memory to host memory."""
  return _moved(x_BTD, 'pinned_host') if _waits_apart() else x_BTD


def _to_device(x_BTD):
  return _moved(x_BTD, 'device') if _waits_apart() else x_BTD


def _moved(x_BTD, kind: str):
  return jax.device_put(x_BTD, x_BTD.sharding.with_memory_kind(kind))


def _waits_apart() -> bool:
  """Whether host and device memory are separate."""
  return sharding.platform() != 'cpu'


def cuts(num_layers: int, removed) -> list[tuple[int, int]]:
  """Returns (layer before, layer after) for each removed block, in ascending order.

  A block that starts at layer 0 is left out, because there is no layer before it.
  """
  kept = pruning.kept_layers(num_layers, removed)
  return [(l, end) for l, end in zip(kept, [*kept[1:], num_layers]) if end > l + 1]


def walk(
  model: Decoder,
  current: Decoder,
  removed,
  batches: Batches,
  mode: Mode,
  beyond: int = 0,
  below: 'tuple[int, Streams] | None' = None,
  progress: Callable[[int, int], None] | None = None,
  sums: float = 1,
) -> Iterator[tuple[int, int, Streams, Streams]]:
  """Yields (l, end, x, t) for each kept layer l, from the one before the first removed block to `beyond` after the last.

  x and t are the inputs of layer l: x in `current` without the removed layers, t in `model`. `end` is the next kept layer.
  The caller advances t to `end` and may change layer l of `current`; x is then advanced through the changed layer.

  Args:
    below: (a layer, its input Streams) to start from. No layer below it may be removed or changed.
    progress: A function from Log.progress.
    sums: How often the caller sums over a layer that it changes, for the progress.
  """
  L, gaps = model.num_layers, cuts(model.num_layers, removed)
  if not gaps:
    return
  (first, _), (last, _) = gaps[0], gaps[-1]
  kept = pruning.kept_layers(L, removed)
  untouched = [l for l in kept if l < first]
  stop = min(len(kept), kept.index(last) + 1 + beyond)
  passes = Passes()
  if progress:
    of_t = [*kept, L][stop] - (first if len(untouched) == first else 0)
    changed = min(stop - len(untouched), len(gaps) * (1 + beyond))
    passes = Passes(progress, math.ceil(stop - 1 + of_t + sums * changed))
  at, x = (below[0], below[1].copy()) if below else (0, Streams.at_the_bottom(model, batches, mode, passes))
  t = x.copy().advance(model, range(at, first)) if len(untouched) < first else None
  x.advance(model, untouched[at:])
  t = t or x.copy()  # both are equal below the first removed block
  for i in range(len(untouched), stop):
    yield kept[i], [*kept, L][i + 1], x, t
    if i + 1 < stop:
      x.advance(current, [kept[i]])
  passes.end()


def prune_changed(current: Decoder, removed, model: Decoder, free: Callable | None) -> Decoder:
  """Removes layers from `current`, a copy of `model` with some changed arrays.

  Args:
    free: See pruning.prune. None: frees the changed arrays only, and `model` is left unchanged.
  """
  return pruning.prune(current, list(removed), free or functools.partial(memory.free, spare=model))


# ---- jitted functions and their parts ----


@functools.partial(jax.jit, static_argnames='mode')
def _embed(model: Decoder, tokens_BT, mode: Mode):
  return embed(model, tokens_BT, mode)


@functools.partial(jax.jit, static_argnames='mode')
def _advance(model: Decoder, x_BTD, alive_L, mode: Mode):
  return run_layers(model, x_BTD, alive_L, mode, jnp.ones(model.num_layers, jnp.float32))[0]


def layer_at(model: Decoder, l, x_BTD) -> tuple[Block, jax.Array]:
  """Returns layer l and the input of its attention output projection, [B, T, N, H]. l may be a traced number."""
  spec = model.spec
  kind_l = {k: jnp.asarray(of_L)[l] for k, of_L in kinds(spec).items()}
  rope, window = rope_and_window(spec, rope_tables(spec, x_BTD.shape[1]), kind_l)
  block = jax.tree.map(lambda a: a[l], model.layers)
  return block, block.mixed(x_BTD, rope, window, mixer_of(spec, kind_l))


@jax.jit
def channel_ratios(x_BTD, y_BTD):
  """Returns (Σ over sequences of Σ |y| / Σ |x| per channel, number of sequences). The inner sums run over tokens."""

  def size_BD(a_BTD):
    return jnp.sum(jnp.abs(a_BTD.astype(jnp.float32)), 1)

  ratio_BD = size_BD(y_BTD) / jnp.maximum(size_BD(x_BTD), 1e-12)
  return spread((jnp.sum(ratio_BD, 0), jnp.float32(ratio_BD.shape[0])))


# ---- one layer of a stacked parameter, on the host ----


def get_layer(weight, l: int) -> np.ndarray:
  return hosts.to_host(weight.get_value()[l]).astype(np.float64)


def put_layer(weight, value: np.ndarray, l: int):
  """Sets layer l of a stacked parameter. Every process must pass the same value."""
  stacked = weight.get_value()
  weight.set_value(_with_layer(stacked, value.astype(stacked.dtype), l, weight.get_metadata()['axes']))


@functools.partial(jax.jit, static_argnames='axes')
def _with_layer(stacked, value, l, axes: str):
  return sharding.constrain(stacked.at[l].set(value), *sharding.spec(axes))


# ---- for the plan ----


def stream_programs(shapes: Shapes, name: str, sums: Callable, *args, layers: int = 1) -> list[Program]:
  """Programs of a recipe: the hidden states of two models through the layers, and the sums of some layers.

  Args:
    sums: Called with (x_BTD, target_BTD, *args).
    layers: Number of sums per removed block: one for each refitted layer and matrix.
  """
  dense, steps = shapes.dense, shapes.settings.fitted_steps
  B, T = shapes.tokens_BT.shape
  x_BTD = jax.ShapeDtypeStruct((B, T, shapes.spec.d_model), shapes.mode.dtype, sharding=shapes.tokens_BT.sharding)
  # The changed model shares all other arrays with the dense one.
  size, changed = device_bytes(dense), device_bytes((dense.layers.w_down, dense.layers.wo))
  through = _advance, (dense, x_BTD, np.ones(shapes.num_layers, bool), shapes.mode), shapes.layers_flops
  devices = list(shapes.mesh.devices.flat)
  waiting = 2 * steps * device_bytes(x_BTD)
  on_cpu = devices[0].platform == 'cpu'
  beside = changed + (waiting if on_cpu else 0)
  of_batch = jax.eval_shape(sums, x_BTD, x_BTD, *args)
  of_products = sum(2.0 * B * T * a.size for a in jax.tree.leaves(of_batch) if a.ndim == 2)
  of_sums = sums, (x_BTD, x_BTD, *args), shapes.layers_flops / max(1, shapes.num_layers) + of_products
  total, solved = total_device_bytes(of_batch, len(devices)), solver_host_bytes(of_batch)
  found = [
    Program(f'{name}, streams', *through, size, beside=beside, calls=math.ceil(2 * PASSED * steps)),
    Program(name, *of_sums, size, beside=beside + total + (solved if on_cpu else 0), calls=layers * steps),
  ]
  if on_cpu:
    return found
  of_host = sum(d.process_index == devices[0].process_index for d in devices)
  return [*found, Program(f'{name}, on the host', None, (), 0, 0, beside=of_host * waiting + solved, host=True)]
