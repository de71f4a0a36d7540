"""A row of a table without a whole run: layers chosen or given, a recipe, figures. For the other benchmarks."""

import dataclasses
import shutil

import jax

from elder_jax.devices.about import device_name
from elder_jax.recipes.context import Choice
from elder_jax.run import work
from elder_jax.run.config import Config
from elder_jax.run.job import Run
from elder_jax.run.prepare import prepare
from elder_jax.run.stages import Stage
from elder_jax.run.stages import stages
from elder_jax.training.batches import Batches


def begin(config: Config) -> Run:
  """A run of these settings, of which nothing is done yet."""
  return Run(prepare(config), device_name)


def choose(run: Run, num_remove: int, seed: int) -> Choice:
  """What the first method of the run chooses by the run's sequences, in the order of another seed."""
  job, dense = run.job, run.dense
  batches = Batches(job.batches.rows, job.batches.batch_size, seed, job.mesh)
  run = Run(dataclasses.replace(job, config=job.config.replace(seed=seed), batches=batches), device_name)
  run.dense = dense  # loaded once for both
  stage = next(stage for stage in stages(job.config, [num_remove]) if stage.method and not stage.recipe)
  with jax.set_mesh(job.mesh):
    return Choice.from_json(stage.run(run, stage))


def figures(run: Run, choice: Choice, recipe: str, name: str) -> dict:
  """{'ppl', 'tasks'} of the model by a recipe; nothing is exported."""
  run.pruned = None  # of the figures before
  with jax.set_mesh(run.job.mesh):
    stage = Stage(name, name, name, work.treat, work.take_nothing, lambda shapes: [], recipe=recipe)
    run.pruned = work.apply_recipe(run, stage, choice)
    found = work.measure(run.job, run.pruned, name)
  # A training ends with a checkpoint; these are of no use once there are figures, and each has a gigabyte or more.
  shutil.rmtree(run.job.config.path() / 'checkpoints', ignore_errors=True)
  return found
