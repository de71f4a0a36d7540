"""Trains the model of a row with the run's log, checkpoints and held-out sequences."""

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
  """Returns the model after the training of a recipe.

  Args:
    name: of the stage.
    start: the model that the recipe made from the dense one.
    free: as in trainer.train.
  """
  config = job.config
  settings = dataclasses.replace(config.train_settings(), only=recipe.only)
  tokens = config.data.batch_size * config.data.seq_len
  progress, record = job.log.progress(f'training, {name}', tokens=tokens), job.log.steps(name, tokens)
  held_out = _validation(job, name, recipe, start, choice)

  def report(step: int, metrics: dict):
    record(step, metrics)
    losses = {'loss': metrics['loss']}
    if settings.taught or penalised:
      losses['lm'] = metrics['lm_loss']
    if held_out and held_out.history:
      losses['held-out'] = held_out.history[-1][1]
    progress(step + 1, settings.steps, '  '.join(f'{what} {loss:.2f}' for what, loss in losses.items()))

  dtype = lora.merged_dtype(config.computation.dtype, config.output.export_dtype or job.source.dtype)
  penalised = choice.removed if recipe.removes_last else []
  return train(
    start,
    penalised,
    settings,
    job.mode,
    job.batches,
    report,
    checkpoints(job, name, settings.steps),
    teacher,
    dtype,
    free,
    held_out,
    _layers_of_teacher(job, recipe, choice),
  )


def _layers_of_teacher(job: Job, recipe: Recipe, choice: Choice) -> list[int] | None:
  """For each trained layer, the teacher's layer that it was. None if --distill_hidden is 0."""
  if not job.config.training.distill_hidden:
    return None
  num_layers = job.source.num_layers
  kept = list(range(num_layers)) if recipe.removes_last else pruning.kept_layers(num_layers, choice.removed)
  return kept if job.kept_layers is None else [job.kept_layers[l] for l in kept]


def _validation(job: Job, name: str, recipe: Recipe, start: Decoder, choice: Choice) -> validation.Validation | None:
  if job.held_out is None:
    return None
  settings, record = job.config.training, job.log.steps(f'{name}.held_out')

  def report(step: int, loss: float):
    log(f'{name}: held-out loss after step {step}: {loss:.4f}')
    record(step, {'held_out_loss': loss})

  alive_L = None
  if recipe.removes_last:
    alive_L = ~np.isin(np.arange(start.num_layers), choice.removed)
  folder, keeps_best = _held_out_folder(job, name), settings.export == 'best'
  return validation.Validation(job.held_out, settings.validate_every, job.mode, folder, keeps_best, alive_L, report)


def curve(job: Job, name: str) -> list[list]:
  """Returns [[step, tokens, held-out loss], …] of a finished training. Losses are in nats per token."""
  tokens = job.config.data.batch_size * job.config.data.seq_len
  return [[step, step * tokens, loss] for step, loss in validation.read_history(_held_out_folder(job, name))]


def checkpoints(job: Job, name: str, steps: int) -> Checkpoints:
  """The checkpoints of a stage with `steps` steps."""
  settings = job.config.computation
  folder = job.config.path() / 'checkpoints' / name
  return Checkpoints(folder, settings.checkpoint_every, steps, settings.checkpoint_minutes, settings.keep_checkpoints)


def notes(job: Job, stage: str) -> Notes:
  """The notes of a stage."""
  return Notes(job.config.path() / 'checkpoints' / stage / 'notes.json')


def clear(job: Job, name: str):
  """Removes the checkpoints of a row that has been measured."""
  checkpoints(job, name, 0).clear()
  validation.clear(_held_out_folder(job, name))


def _held_out_folder(job: Job, name: str) -> pathlib.Path:
  return job.config.path() / 'checkpoints' / f'{name}.held_out'
