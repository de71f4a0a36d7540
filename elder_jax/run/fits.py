"""Saves the result of a closed-form fit while its row is trained and measured.

A fit runs up to a million tokens through the whole model twice. A run that is killed afterwards does not repeat it.
"""

import time

import jax
import jax.numpy as jnp

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.devices import sharding
from elder_jax.hf.table import abstract_model
from elder_jax.log import log
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.recipes import patch
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.recipe import Recipe
from elder_jax.run.job import Job
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.step import TrainState
from elder_jax.training.step import on_all_devices

WORTH = 60.0  # seconds; a faster fit is not saved


def fit(job: Job, name: str, recipe: Recipe, context: Context, choice: Choice) -> Decoder:
  """Returns the result of Recipe.start for the row of this name. Saves it if it took long."""
  begun = time.monotonic()
  model = recipe.start(context, choice)
  if recipe.reads_text and hosts.broadcast_json(time.monotonic() - begun >= WORTH):  # clocks differ
    kept = _kept(job, name)
    kept.save(_as_state(model))
    kept.wait()
  return model


def kept_fit(job: Job, name: str, recipe: Recipe, choice: Choice) -> Decoder | None:
  """Returns what `fit` saved in an earlier attempt; None if it saved nothing or the file cannot be read."""
  if not recipe.reads_text:
    return None
  template = _as_state(_abstract(job, recipe, choice))
  found = _kept(job, name).latest(template)
  if found is template:
    return None
  log(f'{name}: using the fit of an earlier attempt')
  return found.trained


def sharing(model: Decoder, dense: Decoder) -> Decoder:
  """Replaces arrays of `model` by equal ones of `dense`, such as the embedding and head, and frees the copies."""
  of_dense = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_flatten_with_path(dense)[0]}

  def shared(path, a):
    b = of_dense.get(jax.tree_util.keystr(path))
    if b is None or a.shape != b.shape or not hosts.to_host(_equal(a, b)):
      return a
    memory.free(a)
    return b

  return jax.tree_util.tree_map_with_path(shared, model)


@jax.jit
def _equal(a, b):
  return sharding.replicate(jnp.array_equal(a, b))


def clear(job: Job, name: str):
  """Removes the saved fit of a row that has been measured."""
  _kept(job, name).clear()


def _kept(job: Job, name: str) -> Checkpoints:
  return Checkpoints(job.config.path() / 'checkpoints' / f'{name}.fitted', every=0, last=0, keep=1)


def _as_state(model: Decoder) -> TrainState:
  return TrainState(on_all_devices(0, model), model, ())


def _abstract(job: Job, recipe: Recipe, choice: Choice) -> Decoder:
  settings, source = job.config.computation, job.source
  dense = abstract_model(source.spec, source.num_layers, settings.dtype, job.mesh, settings.mesh)
  model = pruning.cut_shapes(dense, len(choice.removed))
  kept = pruning.kept_layers(source.num_layers, choice.removed)
  model.spec = model.layers.spec = source.spec.with_layers(kept)
  return patch.abstract(model) if recipe.patches else model
