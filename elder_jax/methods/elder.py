"""The method elder: learns one gate per layer with the weights frozen, then chooses the layers with the lowest gates.

ELDeR, arXiv 2505.18232, section 3.2. Loss = LM loss + λ1·Σ|g| over the layers that are alive.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import training_flops
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.settings import Settings
from elder_jax.settings import fields
from elder_jax.settings import name_of
from elder_jax.settings import setting
from elder_jax.training.loop import run_steps
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.programs import steps_program
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import on_all_devices
from elder_jax.training.step import train_mask


@dataclasses.dataclass(frozen=True)
class GateSettings(Settings):
  """Settings of the gates' training."""

  gate: str = setting(
    'residual',
    'What a gate g scales: residual, the update only, x + g*d; output, the whole output as in the paper, g*(x + d).',
    choices=('residual', 'output'),
    rare=True,
  )
  selection: str = setting(
    'one_shot',
    'one_shot: choose all layers after one round; iterative: choose one layer per round and skip it in later rounds.',
    choices=('iterative', 'one_shot'),
    rare=True,
  )
  lambda1: float = setting(5e-3, 'Weight of the L1 penalty on the gates.', least=0, rare=True)
  lr: float = setting(0.005, 'Learning rate of the gates (Adam).', flag='gate_lr', least=0)
  steps: int = setting(
    28,
    'Steps per round of stage 1; one_shot has one round, iterative one per removed layer.',
    flag='gate_steps',
    least=1,
  )
  protect_first: int = setting(3, 'Number of first layers that elder and mask never choose.', least=0, rare=True)
  protect_last: int = setting(4, 'Number of last layers that elder and mask never choose.', least=0, rare=True)

  @property
  def iterative(self) -> bool:
    return self.selection == 'iterative'

  def rounds(self, num_remove: int) -> int:
    return num_remove if self.iterative else min(1, num_remove)

  def candidates(self, num_layers: int) -> range:
    """The layers that may be chosen."""
    return range(self.protect_first, num_layers - self.protect_last)


READS = (*map(name_of, fields(GateSettings)), 'grad_clip', 'grad_accum')  # settings


def begin(model: Decoder, num_remove: int, settings: GateSettings, mode: Mode, clip: float = 1.0, grad_accum: int = 1):
  """Returns (the step of step.make_step, its initial state, the frozen weights)."""
  mask = train_mask(model, 'gates')

  def rate(step):
    return settings.lr + 0.0 * step

  tx = make_optimizer(mask, rate, 0.0, clip)
  state, frozen = init_state(model, mask, tx)
  ones_RL = np.ones((settings.rounds(num_remove), model.num_layers), np.float32)
  state = state._replace(history_RL=on_all_devices(ones_RL, state.trained))
  return make_step(tx, mode, grad_accum, rate), state, frozen


def terms(alive_L: np.ndarray, lambda1: float) -> dict[str, np.ndarray]:
  """The terms of losses.loss that train the gates of the layers `alive_L`."""
  return {
    'alive_L': alive_L.copy(),
    'gate_weight_L': np.where(alive_L, np.float32(lambda1), np.float32(0)),
    'delta_weight_L': np.zeros(len(alive_L), np.float32),
  }


def learn(
  model: Decoder,
  num_remove: int,
  settings: GateSettings,
  mode: Mode,
  batches: Batches,
  log: Callable[[int, int, dict], None] = lambda round_, step, metrics: None,
  checkpoint=None,
  clip: float = 1.0,
  grad_accum: int = 1,
) -> tuple[list[int], list[list[float]]]:
  """Learns the gates and chooses layers.

  Iterative: each round chooses the candidate with the lowest |g|. Later rounds skip it and continue with the gates of the
  other layers. One-shot: all layers are chosen after one round.

  Args:
    log: Called with (round, step, metrics).
    checkpoint: A checkpoints.Checkpoints to resume from and write to, or None.
    clip: Maximum gradient norm.
    grad_accum: Number of parts that a batch is split into.

  Returns:
    The chosen layers in the order in which they were chosen, and all gates at the end of each round.
  """
  step_fn, state, frozen = begin(model, num_remove, settings, mode, clip, grad_accum)
  L = model.num_layers
  if checkpoint:
    state = checkpoint.latest(state)
  # How resuming works: the state holds the step, which gives the round, and the gates at the end of each finished round,
  # which give the chosen layers. So the loop below replays finished rounds without a step. The last step of a round is
  # saved before the gates of that round are, so after it the round still has to be finished.
  over = max(0, int(state.step) - 1) // settings.steps
  history_RL = np.array(state.history_RL)

  alive_L, chosen = np.ones(L, bool), []
  for r in range(settings.rounds(num_remove)):
    if r >= over:
      end = (r + 1) * settings.steps
      now = functools.partial(_same, terms(alive_L, settings.lambda1))
      state = run_steps(step_fn, state, (frozen, None), end, batches, now, functools.partial(log, r), checkpoint)
      # Adam's momentum still moves the gate of a skipped layer, without effect; record its value when it was chosen.
      history_RL[r] = np.where(alive_L, jax.device_get(state.trained.gate_L.get_value()), history_RL[r - 1])
      state = state._replace(history_RL=on_all_devices(history_RL, state.trained))
    gate_L = history_RL[r]
    by_gate = sorted((l for l in settings.candidates(L) if alive_L[l]), key=lambda l: (abs(gate_L[l]), l))
    for l in by_gate[: 1 if settings.iterative else num_remove]:
      chosen.append(l)
      alive_L[l] = False
  return chosen, [[float(g) for g in gate_L] for gate_L in history_RL]


def _same(value, step: int):
  del step
  return value


def why_not(settings, num_layers: int, num_remove: int) -> str:
  """Implements Method.refuses."""
  gates = settings.gates
  free = len(gates.candidates(num_layers))
  if num_remove <= free:
    return ''
  return (
    f'cannot remove {num_remove} layers of {num_layers}: --protect_first={gates.protect_first} and '
    f'--protect_last={gates.protect_last} leave only {free} to choose from; remove fewer or protect fewer.'
  )


def choose(context: Context, num_remove: int) -> Choice:
  """Implements Method.choose. `about` holds all gates at the end of each round."""
  config = context.settings
  total = config.gates.steps * config.gates.rounds(num_remove)
  tokens = config.data.batch_size * config.data.seq_len
  progress, record = context.log.progress('stage 1, gates', tokens=tokens), context.log.steps('gates', tokens)

  def log(round_: int, step: int, metrics: dict):
    record(step, metrics, round=round_)
    progress(step + 1, total, f'round {round_ + 1}, loss {metrics["loss"]:.4f}')

  chosen, history = learn(
    context.model,
    num_remove,
    config.gates,
    context.mode,
    context.batches,
    log,
    context.checkpoints('gates', total),
    config.training.grad_clip,
    config.training.grad_accum,
  )
  return Choice(chosen, about={'gates': history})


def programs(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs."""
  config, dense = shapes.settings, shapes.dense
  ones_L = np.ones(shapes.num_layers, bool)
  flops = training_flops(shapes.spec, shapes.num_layers, shapes.tokens_BT.shape[1], 'gates')

  def begin_here(model: Decoder):
    training = config.training
    return begin(model, num_remove, config.gates, shapes.mode, training.grad_clip, training.grad_accum)

  steps = config.gates.steps * config.gates.rounds(num_remove)
  now = terms(ones_L, config.gates.lambda1)
  return [steps_program(shapes, 'stage 1, gates', begin_here, dense, None, now, flops, steps)]
