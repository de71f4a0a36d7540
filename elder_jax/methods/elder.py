"""Stage 1: learn a gate per layer with the weights frozen, and choose the layers whose gates end lowest."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.training import loop


@dataclasses.dataclass(frozen=True)
class GateSettings:
  num_remove: int
  iterative: bool
  steps: int  # per round
  lr: float
  lambda1: float
  candidates: tuple[int, ...]  # the layers that may be chosen
  clip: float = 1.0
  grad_accum: int = 1

  @property
  def rounds(self) -> int:
    return self.num_remove if self.iterative else min(1, self.num_remove)


def begin(model: Decoder, settings: GateSettings, mode: Mode):
  """(step of train.make_step, its first state, frozen)."""
  mask = loop.mask(model, 'gates')
  rate = lambda step: settings.lr + 0.0 * step
  tx = loop.optimizer(mask, rate, 0.0, settings.clip)
  state, frozen = loop.init(model, mask, tx)
  ones_RL = np.ones((settings.rounds, model.num_layers), np.float32)
  state = state._replace(history_RL=loop.on_all_devices(ones_RL, state.trained))
  return loop.make_step(tx, mode, settings.grad_accum, rate), state, frozen


def terms(alive_L: np.ndarray, lambda1: float) -> dict[str, np.ndarray]:
  """The terms of losses.loss while the layers alive_L are learned."""
  return {
    'alive_L': alive_L.copy(),
    'gate_weight_L': np.where(alive_L, np.float32(lambda1), np.float32(0)),
    'delta_weight_L': np.zeros(len(alive_L), np.float32),
  }


def learn(
  model: Decoder,
  settings: GateSettings,
  mode: Mode,
  batch: Callable[[int], jax.Array],
  log: Callable[[int, int, dict], None],
  checkpoint=None,
) -> tuple[list[int], list[list[float]]]:
  """Chooses layers (ELDeR, arXiv 2505.18232, section 3.2).

  Loss = LM loss + λ1·Σ|g| over the layers that are alive. Iterative: after each round the alive candidate of the least
  |g| is chosen and from then on skipped, the other gates go on from where they stand. One-shot: all after one round.

  Args:
    log: called with (round, step, metrics).
    checkpoint: a checkpoint.Checkpoints to go on from and to write to, or None.

  Returns:
    The chosen layers in the order of their choice, and all gates at the end of each round.
  """
  step_fn, state, frozen = begin(model, settings, mode)
  L = model.num_layers
  if checkpoint:
    state = checkpoint.latest(state)
  # The one rule of resume: the step tells the round, and what is chosen and alive follows from the gates at the end of
  # the rounds that are over, which are in the state. So these rounds are gone through again, without a step. A round's
  # last step is saved before its gates are: after it, the round is still to be ended.
  over = max(0, int(state.step) - 1) // settings.steps
  history_RL = np.array(state.history_RL)

  alive_L, chosen = np.ones(L, bool), []
  for r in range(settings.rounds):
    if r >= over:
      now, end = terms(alive_L, settings.lambda1), (r + 1) * settings.steps
      log_round = lambda i, m: log(r, i, m)
      state = loop.fit(step_fn, state, (frozen, None), end, batch, lambda _: now, log_round, checkpoint)
      # Adam's momentum still moves the gate of a layer that is skipped, to no effect: it stands where it was chosen.
      history_RL[r] = np.where(alive_L, jax.device_get(state.trained.gate_L.get_value()), history_RL[r - 1])
      state = state._replace(history_RL=loop.on_all_devices(history_RL, state.trained))
    gate_L = history_RL[r]
    by_gate = sorted((l for l in settings.candidates if alive_L[l]), key=lambda l: (abs(gate_L[l]), l))
    for l in by_gate[: 1 if settings.iterative else settings.num_remove]:
      chosen.append(l)
      alive_L[l] = False
  return chosen, [[float(g) for g in gate_L] for gate_L in history_RL]
