"""Trains a model: language modelling, distillation, LoRA, and the penalty on layers that will be removed."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses

import jax

from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.loop import run_steps
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.settings import TrainSettings
from elder_jax.training.step import combine
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask
from elder_jax.training.terms import loss_terms
from elder_jax.training.validation import Validation


def begin_training(model: Decoder, settings: TrainSettings, mode: Mode, free: Callable | None = None):
  """Returns (the step of step.make_step, the initial state, frozen). free: see step.init_state."""
  # With gates at 1 both placements are the same network, but only the gate in x + g·d can be annealed.
  mode = dataclasses.replace(mode, gate='residual')
  if settings.trained == 'lora':
    model = lora.attach(model, settings.lora_rank, settings.alpha, settings.seed)
  mask = train_mask(model, settings.trained)
  rate = learning_rate(
    settings.lr, settings.steps, settings.warmup_ratio, settings.lr_schedule, settings.lr_final, settings.decay_ratio
  )
  tx = make_optimizer(mask, rate, settings.weight_decay, settings.grad_clip, settings.optimizer, settings.moment_dtype)
  step = make_step(tx, mode, settings.grad_accum, rate, settings.temperature)
  return step, *init_state(model, mask, tx, free)


def train(
  model: Decoder,
  layers: list[int],
  settings: TrainSettings,
  mode: Mode,
  batches: Sequence[jax.Array],
  log: Callable[[int, dict], None] = lambda step, metrics: None,
  checkpoint=None,
  teacher: Decoder | None = None,
  merged_dtype: str = 'float32',
  free: Callable | None = None,
  validation: Validation | None = None,
  kept: Sequence[int] | None = None,
) -> Decoder:
  """Trains `model` (gates at 1), with the penalty on `layers`; [] trains without a penalty, as in prune-then-train.

  Args:
    model: the model.
    layers: 0-based.
    settings: of the training.
    mode: of the computation.
    batches: tokens [B, T] of each step (training/batches.py).
    log: called with (step, metrics).
    checkpoint: a checkpoints.Checkpoints to resume from and to write to, or None.
    teacher: the dense model; required if settings.taught.
    merged_dtype: dtype of the matrices that LoRA's factors are merged into (lora.merged_dtype).
    free: called with arrays of `model` once they are not needed any more (memory.free).
    validation: measures the held-out loss during training; required if settings.export is best.
    kept: see terms.loss_terms.

  Returns:
    The model. Trained leaves are float32; with LoRA the merged matrices are `merged_dtype`.

  Raises:
    NonFiniteLoss, Preempted: see loop.run_steps.
  """
  step_fn, state, frozen = begin_training(model, settings, mode, free)
  if checkpoint:
    state = checkpoint.latest(state)
  fixed = frozen, teacher if settings.taught else None

  weight_of = getattr(batches, 'weight_BT', lambda step: None)

  def terms(step):
    weight_BT = weight_of(step)
    weighted = {} if weight_BT is None else {'weight_BT': weight_BT}
    return loss_terms(model.num_layers, layers, settings, step, kept) | weighted

  state = run_steps(step_fn, state, fixed, settings.steps, batches, terms, log, checkpoint, validation)
  if validation and settings.export == 'best':
    state = validation.best(state)
  result = combine(state.trained, frozen)
  return lora.merge(result, merged_dtype, free) if settings.trained == 'lora' else result
