"""Stage 2: train with a penalty on the updates of the layers that will go; and the same training without a penalty."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.training import loop


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  steps: int
  lr: float
  lambda2: float
  lambda2_power: float = 0.0  # λ2·f^power at the fraction f of the steps (of a layer's turn where sequential)
  sequential: bool = False
  anneal: float = 0.0  # fraction of the steps in which the layers' gates go from 1 to 0; 0: they stay at 1
  distill: float = 0.0  # weight of the KL to the teacher, 1 − distill that of the LM loss
  trainable: str = 'blocks'
  warmup_ratio: float = 0.05
  weight_decay: float = 0.0
  clip: float = 1.0
  grad_accum: int = 1
  optimizer: str = 'adamw'
  moment_dtype: str = 'float32'
  lora_rank: int = 0  # 0: all that `trainable` says is trained
  lora_alpha: float = 0.0
  seed: int = 0  # of LoRA's factors


def penalty_terms(num_layers: int, layers: list[int], settings: TrainSettings, step: int) -> dict[str, np.ndarray]:
  """The terms of losses.loss at a step, a pure function of it.

  Joint (ELDeR, arXiv 2505.18232, section 3.3): λ2 on all of `layers` in every step. Sequential: the steps are shared
  out among `layers`, one after another in the order given; a layer whose turn is over is skipped. Annealed: the gates
  of `layers` fall linearly to 0 over the first `anneal` of the steps (of each turn, where sequential).
  """
  alive_L = np.ones(num_layers, bool)
  weight_L = np.zeros(num_layers, np.float32)
  turns = len(layers) if settings.sequential else 1
  turn = min(turns - 1, step * turns // max(1, settings.steps)) if turns else 0
  first, end = (-(-settings.steps * t // max(1, turns)) for t in (turn, turn + 1))
  fraction = (step - first + 1) / max(1, end - first)
  now = layers[turn : turn + 1] if settings.sequential else layers
  weight_L[now] = settings.lambda2 * fraction**settings.lambda2_power
  if settings.sequential:
    alive_L[layers[:turn]] = False
  gate_L = np.ones(num_layers, np.float32)
  if settings.anneal:
    gate_L[now] = max(0.0, 1 - fraction / settings.anneal)
  zeros_L = np.zeros(num_layers, np.float32)
  return {'alive_L': alive_L, 'gate_L': gate_L, 'gate_weight_L': zeros_L, 'delta_weight_L': weight_L}


def begin(model: Decoder, settings: TrainSettings, mode: Mode, free: Callable | None = None):
  """(step of train.make_step, its first state, frozen); free: of train.init."""
  # A gate at 1 is the same network in both places; only at x + g·d can it be annealed.
  mode = dataclasses.replace(mode, gate='residual')
  if settings.lora_rank:
    model = lora.attach(model, settings.lora_rank, settings.lora_alpha, settings.seed)
  mask = loop.mask(model, 'lora' if settings.lora_rank else settings.trainable)
  rate = loop.schedule(settings.lr, settings.steps, settings.warmup_ratio)
  tx = loop.optimizer(mask, rate, settings.weight_decay, settings.clip, settings.optimizer, settings.moment_dtype)
  step = loop.make_step(tx, mode, settings.grad_accum, rate, settings.distill)
  return step, *loop.init(model, mask, tx, free)


def fit(
  model: Decoder,
  layers: list[int],
  settings: TrainSettings,
  mode: Mode,
  batch: Callable[[int], jax.Array],
  log: Callable[[int, dict], None],
  checkpoint=None,
  teacher: Decoder | None = None,
  merged_dtype: str = 'float32',
  free: Callable | None = None,
) -> Decoder:
  """Trains `model` (gates at 1) with the penalty on `layers`; [] is plain LM training, as for prune-then-train.

  Args:
    log: called with (step, metrics).
    checkpoint: a checkpoint.Checkpoints to go on from and to write to, or None.
    teacher: the dense model; needed where settings.distill > 0.
    merged_dtype: of the matrices that take up LoRA's factors (lora.merged_dtype).
    free: called with the arrays of `model` that are not needed any more, as soon as they are not (memory.free).

  Returns:
    The model with its trained leaves in float32, or with LoRA its matrices in `merged_dtype`.
  """
  step_fn, state, frozen = begin(model, settings, mode, free)
  if checkpoint:
    state = checkpoint.latest(state)
  fixed = frozen, teacher if settings.distill else None
  terms = lambda step: penalty_terms(model.num_layers, layers, settings, step)
  state = loop.fit(step_fn, state, fixed, settings.steps, batch, terms, log, checkpoint)
  result = loop.combine(state.trained, frozen)
  return lora.merge(result, merged_dtype, free) if settings.lora_rank else result
