"""The best of auto's candidates, judged again: after steps of training, by a task, or by a function of the user's."""

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
  """Whether a run asks for it."""
  return settings.removal.judge_steps > 0 or settings.removal.judge_by != 'loss'


def _training_settings(settings) -> TrainSettings:
  """Those of the run, for the steps of a judgement."""
  of_run = settings.train_settings()
  return dataclasses.replace(of_run, steps=settings.removal.judge_steps, validate_every=0, export='last', only='')


def figures(
  context: Context, choices: dict[str, list[int]], held_out: Batches, fit: Batches, notes: MutableMapping
) -> dict[str, float]:
  """{method: figure}, the lower the better, of each choice: absorbed, and trained for --judge_steps.

  Args:
    notes: figures that are known, and where new ones go.
  """
  for name, removed in choices.items():
    if (key := f'again {name}') in notes:
      continue
    context.log.say(f'judging the layers that {name} chooses again')
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

  def told(step: int, metrics: dict):
    progress(step + 1, settings.steps, f'loss {metrics["loss"]:.4f}')

  kept = pruning.kept_layers(dense.num_layers, removed)
  teacher = dense if settings.taught else None
  saved = context.checkpoints(f'judge-{name}-{len(removed)}', settings.steps)
  batches = context.batches[skip : skip + settings.steps]
  made = train(model, [], settings, context.mode, batches, told, saved, teacher, kept=kept)
  memory.free(model, (made, dense))
  return made


def programs(shapes: Shapes, num_remove: int) -> list[Program]:
  """The training of a candidate; the dense model stays."""
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
