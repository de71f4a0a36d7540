"""The training loop that every stage uses: steps, metrics, checkpoints and preemption."""

from collections.abc import Callable
from collections.abc import Sequence
import math

import jax
import numpy as np

from elder_jax.devices import preemption
from elder_jax.training.step import TrainState


class NonFiniteLoss(RuntimeError):
  """The loss or its gradient became NaN or infinite."""


def run_steps(
  step_fn,
  state: TrainState,
  fixed,
  steps: int,
  batches: Sequence[jax.Array],
  terms: Callable[[int], dict],
  log: Callable[[int, dict], None],
  checkpoint=None,
  validation=None,
) -> TrainState:
  """Runs step_fn until `steps` are done. Batches and terms depend only on the step, so the state is all it resumes from.

  Metrics are read one step late, so that the device does not wait for the host, but always before a checkpoint is
  written. A checkpoint that is being written is completed even if the loop ends with an error.

  Args:
    step_fn, fixed: of step.make_step, and its second argument.
    state: the initial or restored state.
    steps: total number of steps, including those done in `state`.
    batches: tokens [B, T] of each step.
    terms: step -> the terms of losses.loss.
    log: called with (step, metrics).
    checkpoint: a checkpoints.Checkpoints to write to, or None.
    validation: a validation.Validation, which reads frozen as fixed[0], or None. It runs before the checkpoint of the
      same step, so its history is never older than a checkpoint.

  Raises:
    NonFiniteLoss: the loss or gradient of a step is not finite. That step is not saved.
    Preempted: after SIGTERM or a preemption notice, once the current step is done and saved.
  """
  waiting, stop = None, False
  if validation:
    validation.begin(state, fixed[0])
  try:
    for i in range(int(state.step), steps):
      state, metrics = step_fn(state, fixed, batches[i], terms(i))
      if waiting:
        _log(log, *waiting)
      waiting = i, metrics
      stop = preemption.reached()
      if validation and not stop and validation.due(i + 1, steps):
        validation(state, fixed[0])
      if checkpoint and (stop or checkpoint.due(i + 1)):
        _log(log, *waiting)
        waiting = None
        checkpoint.save(state)
      if stop:
        break
    if waiting:
      _log(log, *waiting)
  finally:
    if checkpoint:
      checkpoint.wait()
  if stop:
    saved = f'of {checkpoint.stage}; saved' if checkpoint else 'of a training stage without checkpoints'
    raise preemption.Preempted(
      f'stopped by {preemption.by()} after step {i + 1} {saved}; rerun the same command to resume'
    )
  return state


def _log(log, i, metrics):
  metrics = {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
  for name, value in (('loss', metrics['loss']), ('gradient', metrics['grad_norm'])):
    if not math.isfinite(value):
      raise NonFiniteLoss(f'the {name} of step {i + 1} is {float(value)}; lower --lr, --gate_lr or --lambda2')
  log(i, metrics)
