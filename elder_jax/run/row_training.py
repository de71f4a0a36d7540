"""The training of a row: by the one trainer, with this run's log, checkpoints and held-out rows."""

from collections.abc import Callable
import dataclasses
import pathlib

import numpy as np

from elder_jax.log import log
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.recipes.context import Choice
from elder_jax.recipes.recipe import Recipe
from elder_jax.run.job import Job
from elder_jax.run.notes import Notes
from elder_jax.training import validation
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.trainer import train


def train_row(
  job: Job, name: str, recipe: Recipe, start: Decoder, choice: Choice, teacher: Decoder | None, free: Callable
) -> Decoder:
  """The model after the training of a recipe.

  Args:
    name: of the stage.
    start: what the recipe made of the dense model.
    free: of trainer.train.
  """
  config = job.config
  settings = dataclasses.replace(config.train_settings(), only=recipe.only)
  tokens = config.data.batch_size * config.data.seq_len
  progress, record = job.log.progress(f'training, {name}', tokens=tokens), job.log.steps(name, tokens)

  def told(step: int, metrics: dict):
    record(step, metrics)
    progress(step + 1, settings.steps, f'loss {metrics["loss"]:.4f}, lm {metrics["lm_loss"]:.4f}')

  dtype = lora.merged_dtype(config.computation.dtype, config.output.export_dtype or job.source.dtype)
  penalised = choice.removed if recipe.removes_last else []
  return train(
    start,
    penalised,
    settings,
    job.mode,
    job.batches,
    told,
    checkpoints(job, name, settings.steps),
    teacher,
    dtype,
    free,
    _validation(job, name, recipe, start, choice),
    _layers_of_teacher(job, recipe, choice),
  )


def _layers_of_teacher(job: Job, recipe: Recipe, choice: Choice) -> list[int] | None:
  """For each layer that is trained the teacher's that it was; None: both have the same layers, or nobody asks."""
  if not job.config.training.distill_hidden:
    return None
  num_layers = job.source.num_layers
  kept = list(range(num_layers)) if recipe.removes_last else pruning.kept_layers(num_layers, choice.removed)
  return kept if job.kept_layers is None else [job.kept_layers[l] for l in kept]


def _validation(job: Job, name: str, recipe: Recipe, start: Decoder, choice: Choice) -> validation.Validation | None:
  if job.held_out is None:
    return None
  settings, record = job.config.training, job.log.steps(f'{name}.held_out')

  def told(step: int, loss: float):
    log(f'{name}: held-out loss after step {step}: {loss:.4f}')
    record(step, {'held_out_loss': loss})

  alive_L = None
  if recipe.removes_last:
    alive_L = ~np.isin(np.arange(start.num_layers), choice.removed)
  folder, keeps_best = _held_out_folder(job, name), settings.export == 'best'
  return validation.Validation(job.held_out, settings.validate_every, job.mode, folder, keeps_best, alive_L, told)


def curve(job: Job, name: str) -> list[list]:
  """[[step, tokens, held-out loss], …] of a training that is over."""
  tokens = job.config.data.batch_size * job.config.data.seq_len
  return [[step, step * tokens, loss] for step, loss in validation.read_history(_held_out_folder(job, name))]


def checkpoints(job: Job, name: str, steps: int) -> Checkpoints:
  """Those of a stage."""
  settings = job.config.computation
  folder = job.config.path() / 'checkpoints' / name
  return Checkpoints(folder, settings.checkpoint_every, steps, settings.checkpoint_minutes, settings.keep_checkpoints)


def notes(job: Job, stage: str) -> Notes:
  """Those of a stage."""
  return Notes(job.config.path() / 'checkpoints' / stage / 'notes.json')


def clear(job: Job, name: str):
  """Removes what is not needed any more of a row that was measured."""
  checkpoints(job, name, 0).clear()
  validation.clear(_held_out_folder(job, name))


def _held_out_folder(job: Job, name: str) -> pathlib.Path:
  return job.config.path() / 'checkpoints' / f'{name}.held_out'
