"""Seconds of each stage on the devices of this machine, from two short computations of the run's shapes that are timed."""

from collections.abc import Callable
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.hf.table import abstract_model
from elder_jax.log import duration
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import forward_flops
from elder_jax.model.program import training_flops
from elder_jax.run.stages import Stage
from elder_jax.run.tables import text_table
from elder_jax.training import losses
from elder_jax.training.step import combine
from elder_jax.training.step import partition
from elder_jax.training.step import train_mask

# FLOPs of a timed forward pass on one device: one or two seconds of a small CPU, and much less than that of others.
TIMED = {'cpu': 4e11}
TIMED_ELSEWHERE = 2e13
ENOUGH = 2.0  # seconds after which a computation is not repeated


@dataclasses.dataclass(frozen=True)
class Speed:
  """Model FLOP/s of all devices together, as Program.model_flops counts them.

  gradients: None if no program of the run computes gradients.
  about: what was timed, for people.
  """

  forward: float
  gradients: float | None
  about: str

  def seconds(self, program: Program) -> float:
    """Of all calls of a program."""
    return program.calls * program.model_flops / (self.gradients if program.gradients else self.forward)


def measure_speed(shapes: Shapes, programs: list[Program]) -> Speed:
  """Times a forward pass, and one with gradients if a program has them, of as many layers and rows as are affordable.

  The weights are made up. The mesh must be set (jax.set_mesh).
  """
  spec, mesh, T = shapes.spec, shapes.mesh, shapes.tokens_BT.shape[1]
  rows, num_layers = _affordable(shapes)
  spec = spec.with_layers(range(num_layers))
  how = shapes.mode.dtype, mesh, shapes.settings.computation.mesh
  model = _made_up(abstract_model(spec, num_layers, *how))
  tokens_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (rows, T), dtype=np.int32)
  tokens_BT = sharding.put_batch(tokens_BT, mesh)
  tokens = rows * T
  forward = tokens * sum(forward_flops(spec, num_layers, T)) / _time(_loss, model, tokens_BT, shapes.mode)
  gradients = None
  if any(p.gradients for p in programs):
    parts = partition(model, train_mask(model, 'blocks'))
    flops = tokens * training_flops(spec, num_layers, T, 'blocks')
    gradients = flops / _time(_gradients, *parts, tokens_BT, shapes.mode)
  speeds = f'{forward / 1e12:.3g} TFLOP/s' + (f', {gradients / 1e12:.3g} with gradients' if gradients else '')
  layers = f'{num_layers} layer' + 's' * (num_layers > 1)
  return Speed(forward, gradients, f'{layers}, {rows} × {T} tokens: {speeds}')


def _affordable(shapes: Shapes) -> tuple[int, int]:
  """(rows of a batch, layers) of the timed model: all rows and layers of the run, or as many as TIMED allows."""
  mesh, (B, T) = shapes.mesh, shapes.tokens_BT.shape
  budget = mesh.size * TIMED.get(mesh.devices.flat[0].platform, TIMED_ELSEWHERE)

  def of_row(layers: int) -> float:
    return T * sum(forward_flops(shapes.spec.with_layers([]), layers, T))

  ways = mesh.shape['data'] * mesh.shape['fsdp']
  rows = min(B, max(1, int(budget / of_row(1)) // ways) * ways)
  layers = (budget / rows - of_row(0)) / (of_row(1) - of_row(0))
  return rows, max(1, min(shapes.num_layers, int(layers)))


def _made_up(model):
  """Small weights that differ from each other, sharded like the abstract `model`."""

  def fill(a):
    values = jax.lax.iota(jnp.int32, a.size) % 8191
    return (0.04 * (values / 8191 - 0.5)).reshape(a.shape).astype(a.dtype)

  places = jax.tree.map(lambda a: a.sharding, model)
  return jax.jit(lambda: jax.tree.map(fill, model), out_shardings=places)()


@functools.partial(jax.jit, static_argnames='mode')
def _loss(model, tokens_BT, mode):
  return losses.batch_nll(model, tokens_BT, None, mode)


@functools.partial(jax.jit, static_argnames='mode')
def _gradients(trained, frozen, tokens_BT, mode):
  def nll(trained):
    return losses.batch_nll(combine(trained, frozen), tokens_BT, None, mode)[0]

  return sharding.constrain_state(jax.grad(nll)(trained))


def _time(call: Callable, *args) -> float:
  """Seconds of a call: the fastest of up to three, the first not counted."""
  jax.block_until_ready(call(*args))
  seconds: list[float] = []
  while len(seconds) < 3 and sum(seconds) < ENOUGH:
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    seconds.append(time.perf_counter() - start)
  return min(seconds)


def seconds_by_stage(stages: list[Stage], by_stage: list[list[Program]], speed: Speed) -> dict[str, float]:
  """{title of a stage: estimated seconds}, without the export and stages that compute nothing on the devices."""
  listed = [(stage.title, programs) for stage, programs in zip(stages, by_stage) if stage.seconds != 'export']
  found = {title: sum(map(speed.seconds, programs)) for title, programs in listed}
  return {title: seconds for title, seconds in found.items() if seconds}


def seconds_table(estimated: dict[str, float], speed: Speed) -> str:
  """The estimates as text."""
  rows = [[title, duration(seconds)] for title, seconds in estimated.items()]
  rows.append(['together', duration(sum(estimated.values()))])
  head = f'Estimated time on these devices, from a model of {speed.about}.'
  uncounted = 'Loading, compiling, tasks and the export are not counted.'
  return '\n'.join([head, text_table([['stage', 'time'], *rows]), uncounted])
