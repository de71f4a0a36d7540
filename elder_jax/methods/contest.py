"""A second comparison of auto's best candidates: after some training steps, by a task, or by the user's own function."""

from collections.abc import MutableMapping
import dataclasses
import functools

from elder_jax.devices import memory
from elder_jax.methods import judging
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.recipes import absorb
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Context
from elder_jax.training.programs import training_programs
from elder_jax.training.settings import TrainSettings
from elder_jax.training.trainer import train

FINALISTS = 3


def is_held(settings) -> bool:
  """Whether the settings request a second comparison."""
  return settings.removal.judge_steps > 0 or settings.removal.judge_by != 'loss'


def _training_settings(settings) -> TrainSettings:
  """The run's training settings, with --judge_steps steps."""
  of_run = settings.train_settings()
  return dataclasses.replace(of_run, steps=settings.removal.judge_steps, validate_every=0, export='last', only='')


def figures(
  context: Context, choices: dict[str, list[int]], held_out: Batches, fit: Batches, notes: MutableMapping
) -> dict[str, float]:
  """Returns {method: figure}, lower is better. Each choice is absorbed and trained for --judge_steps steps first.

  Args:
    notes: Figures that are known already; new ones are added.
  """
  for name, removed in choices.items():
    if (key := f'again {name}') in notes:
      continue
    context.log.say(f'second comparison: the choice of {name}')
    model = _treated(context, name, removed, fit, 2 * len(fit))
    judge = context.judge or functools.partial(judging.held_out_loss, held_out=held_out, mode=context.mode)
    notes[key] = float(judge(model))
    memory.free(model, context.model)
  return {name: notes[f'again {name}'] for name in choices}


def _treated(context: Context, name: str, removed: list[int], fit: Batches, skip: int) -> Decoder:
  dense, settings = context.model, _training_settings(context.settings)
  absorbs = not absorb.why_not(dense.spec)
  model = absorb.absorb(dense, removed, fit, context.mode) if absorbs else pruning.prune(dense, list(removed))
  if not settings.steps:
    return model
  progress = context.log.progress(f'judging {name}')

  def on_step(step: int, metrics: dict):
    progress(step + 1, settings.steps, f'loss {metrics["loss"]:.4f}')

  kept = pruning.kept_layers(dense.num_layers, removed)
  teacher = dense if settings.taught else None
  saved = context.checkpoints(f'judge-{name}-{len(removed)}', settings.steps)
  batches = context.batches[skip : skip + settings.steps]
  made = train(model, [], settings, context.mode, batches, on_step, saved, teacher, kept=kept)
  memory.free(model, (made, dense))
  return made


def programs(shapes: Shapes, num_remove: int) -> list[Program]:
  """The training of the finalists, with the dense model in memory."""
  settings = shapes.settings
  if not settings.removal.judge_steps:
    return []
  start = pruning.cut_shapes(shapes.dense, num_remove)
  beside = 0 if settings.training.taught else device_bytes(shapes.dense.layers)
  calls = FINALISTS * settings.removal.judge_steps
  return [
    dataclasses.replace(p, name=f'judging, {p.name}', beside=p.beside + beside, calls=calls)
    for p in training_programs(shapes, start, settings.removal.recipe)
  ]
