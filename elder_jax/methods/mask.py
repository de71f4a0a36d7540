"""The method mask: learns a score per layer with the weights frozen; exactly n layers are off in every training step.

Gumbel noise is added to the scores, and the n highest are off. The gradient is that of a soft mask (straight-through
estimator). The idea is that of E3-Pruner (arXiv 2511.17205).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.methods import elder
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.program import training_flops
from elder_jax.model.spec import Mode
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
from elder_jax.training.step import train_mask

COLDEST = 0.05  # temperature in the last step; the first step has 1
NEVER = -1e9  # added to the score of a protected layer


@dataclasses.dataclass(frozen=True)
class MaskSettings(Settings):
  """Settings of the mask's training."""

  steps: int = setting(64, 'Training steps of --method=mask.', flag='mask_steps', least=1)
  lr: float = setting(0.1, 'Learning rate of the scores of --method=mask (Adam).', flag='mask_lr', least=0, rare=True)
  loss: str = setting(
    'kl',
    "Loss of --method=mask: kl, the KL divergence from the dense model's predictions; lm, the LM loss.",
    flag='mask_loss',
    choices=('kl', 'lm'),
    rare=True,
  )


READS = (*map(name_of, fields(MaskSettings)), 'protect_first', 'protect_last', 'grad_clip', 'grad_accum')


def choose(context: Context, num_remove: int) -> Choice:
  """Implements Method.choose: the layers with the highest scores. Choice.scores holds all scores. Resumable."""
  config, model = context.settings, context.model
  settings, steps = config.mask, config.mask.steps
  tokens = config.data.batch_size * config.data.seq_len
  progress, record = context.log.progress('learning a mask', tokens=tokens), context.log.steps('mask', tokens)

  def log(step: int, metrics: dict):
    record(step, metrics)
    progress(step + 1, steps, f'loss {metrics["loss"]:.4f}')

  training = config.training
  step, state, frozen = begin(model, num_remove, settings, context.mode, training.grad_clip, training.grad_accum)
  checkpoint = context.checkpoints(f'mask-{num_remove}', steps)
  if checkpoint:
    state = checkpoint.latest(state)
  fixed = frozen, model if settings.loss == 'kl' else None
  of_step = functools.partial(terms, model.num_layers, config)
  state = run_steps(step, state, fixed, steps, context.batches, of_step, log, checkpoint)
  score_L = np.asarray(jax.device_get(state.trained.gate_L.get_value()), np.float64)
  candidates = config.gates.candidates(model.num_layers)
  chosen = sorted(candidates, key=lambda l: (-score_L[l], l))[:num_remove]
  return Choice(chosen, score_L.tolist())


def begin(model: Decoder, num_remove: int, settings: MaskSettings, mode: Mode, clip: float = 1.0, grad_accum: int = 1):
  """Returns (the step of step.make_step, its initial state, the frozen weights). The scores are stored as gates."""
  mask = train_mask(model, 'gates')

  def rate(step):
    return settings.lr + 0.0 * step

  tx = make_optimizer(mask, rate, 0.0, clip)
  mode = dataclasses.replace(mode, gate='residual')  # so that a gate of 0 removes the layer
  step = make_step(tx, mode, grad_accum, rate, gates=functools.partial(masked, num_remove=num_remove))
  state, frozen = init_state(model, mask, tx)
  zeros = jax.tree.map(jnp.zeros_like, state.trained)
  return step, state._replace(trained=zeros), frozen


def masked(score_L, terms: dict, num_remove: int):
  """Returns the gates of one draw: 0 for the num_remove highest values of score + noise, 1 for the others.

  The gradient is that of σ((threshold − score − noise) / temperature). The threshold lies halfway between the lowest value
  that is off and the highest that is on, and moves with the scores so that the sum of these sigmoids is constant. So the
  layers compete: a score falls only if its layer is needed more than the others near the threshold.
  """
  noisy_L = score_L + terms['noise_L']
  ordered_L = jnp.sort(noisy_L, descending=True)
  halfway = (ordered_L[num_remove - 1] + ordered_L[num_remove]) / 2
  rank_L = jnp.argsort(jnp.argsort(-noisy_L))
  hard_L = (rank_L >= num_remove).astype(jnp.float32)
  on_L = jax.nn.sigmoid((halfway - noisy_L) / terms['temperature'])
  slope_L = jax.lax.stop_gradient(on_L * (1 - on_L) / terms['temperature'])
  threshold = jnp.sum(slope_L * noisy_L) / jnp.maximum(
    jnp.sum(slope_L), jnp.finfo(jnp.float32).tiny
  )  # its gradient only
  linear_L = slope_L * (threshold - noisy_L)
  return hard_L + (linear_L - jax.lax.stop_gradient(linear_L))


def terms(num_layers: int, config, step: int) -> dict[str, np.ndarray]:
  """The terms of losses.loss and of `masked` at a step; they depend only on the step and the settings."""
  fraction = step / max(1, config.mask.steps - 1)
  temperature = 1 + (COLDEST - 1) * fraction
  gumbel_L = np.random.default_rng([config.data.seed, step]).gumbel(size=num_layers)
  free_L = np.isin(np.arange(num_layers), config.gates.candidates(num_layers))
  zeros_L = np.zeros(num_layers, np.float32)
  found = {
    'alive_L': np.ones(num_layers, bool),
    'gate_weight_L': zeros_L,
    'delta_weight_L': zeros_L,
    'noise_L': np.where(free_L, temperature * gumbel_L, NEVER).astype(np.float32),
    'temperature': np.float32(temperature),
  }
  return found | ({'distill': np.float32(1)} if config.mask.loss == 'kl' else {})


def programs(shapes: Shapes, num_remove: int) -> list[Program]:
  """Implements Method.programs."""
  config, dense = shapes.settings, shapes.dense
  kl = config.mask.loss == 'kl'
  flops = training_flops(shapes.spec, shapes.num_layers, shapes.tokens_BT.shape[1], 'gates')
  flops += shapes.flops() / shapes.tokens_BT.size if kl else 0

  def begin_here(model: Decoder):
    training = config.training
    return begin(model, num_remove, config.mask, shapes.mode, training.grad_clip, training.grad_accum)

  now, teacher = terms(shapes.num_layers, config, 0), dense if kl else None
  program = steps_program(shapes, 'learning a mask', begin_here, dense, teacher, now, flops, config.mask.steps)
  shared = device_bytes(dense) - device_bytes(dense.gate_L) if kl else 0  # the teacher is the same model
  return [dataclasses.replace(program, params=program.params - shared, twice=shared)]


why_not = elder.why_not  # the same layers are protected
