"""Stage 1: learn a gate per layer with the weights frozen, and choose the layers whose gates end lowest."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from elder_jax import train
from elder_jax.model import Decoder
from elder_jax.model import Mode


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


def begin(model: Decoder, settings: GateSettings, mode: Mode):
  """(step of train.make_step, its first state, frozen)."""
  mask = train.mask(model, 'gates')
  rate = lambda step: settings.lr + 0.0 * step
  tx = train.optimizer(mask, rate, 0.0, settings.clip)
  return train.make_step(tx, mode, settings.grad_accum, rate), *train.init(model, mask, tx)


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
) -> tuple[list[int], list[list[float]]]:
  """Chooses layers (ELDeR, arXiv 2505.18232, section 3.2).

  Loss = LM loss + λ1·Σ|g| over the layers that are alive. Iterative: after each round the alive candidate of the least
  |g| is chosen and from then on skipped, the other gates go on from where they stand. One-shot: all after one round.

  Args:
    log: called with (round, step, metrics).

  Returns:
    The chosen layers in the order of their choice, and all gates at the end of each round.
  """
  step_fn, state, frozen = begin(model, settings, mode)
  L = model.num_layers
  alive_L, gate_L = np.ones(L, bool), np.ones(L, np.float32)
  chosen, history = [], []
  rounds = settings.num_remove if settings.iterative else min(1, settings.num_remove)
  for r in range(rounds):
    now = terms(alive_L, settings.lambda1)
    state = train.fit(
      step_fn, state, (frozen, None), (r + 1) * settings.steps, batch, lambda _: now, lambda i, m: log(r, i, m)
    )
    # Adam's momentum still moves the gate of a layer that is skipped, to no effect: it stands where it was chosen.
    gate_L = np.where(alive_L, jax.device_get(state.trained.gate_L.get_value()), gate_L)
    history.append([float(g) for g in gate_L])
    by_gate = sorted((l for l in settings.candidates if alive_L[l]), key=lambda l: (abs(gate_L[l]), l))
    for l in by_gate[: 1 if settings.iterative else settings.num_remove]:
      chosen.append(l)
      alive_L[l] = False
  return chosen, history
