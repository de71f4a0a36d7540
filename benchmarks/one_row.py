"""Makes a row of a table without a whole run: chosen or given layers, a recipe, figures. Used by other benchmarks."""

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
  """A prepared run with these settings."""
  return Run(prepare(config), device_name)


def choose(run: Run, num_remove: int, seed: int) -> Choice:
  """The choice of the run's first method on the run's sequences, with their order drawn by `seed`."""
  job, dense = run.job, run.dense
  batches = Batches(job.batches.rows, job.batches.batch_size, seed, job.mesh)
  run = Run(dataclasses.replace(job, config=job.config.replace(seed=seed), batches=batches), device_name)
  run.dense = dense  # shared, so that it is loaded once
  stage = next(stage for stage in stages(job.config, [num_remove]) if stage.method and not stage.recipe)
  with jax.set_mesh(job.mesh):
    return Choice.from_json(stage.run(run, stage))


def figures(run: Run, choice: Choice, recipe: str, name: str) -> dict:
  """Applies a recipe and returns {'ppl', 'tasks'} of the model. Exports nothing."""
  run.pruned = None  # frees the model of the previous figures
  with jax.set_mesh(run.job.mesh):
    stage = Stage(name, name, name, work.treat, work.take_nothing, lambda shapes: [], recipe=recipe)
    run.pruned = work.apply_recipe(run, stage, choice)
    found = work.measure(run.job, run.pruned, name)
  # Training ends with a checkpoint of a gigabyte or more, which is not needed once the figures are there.
  shutil.rmtree(run.job.config.path() / 'checkpoints', ignore_errors=True)
  return found
