"""Refuses a run that needs a package which is not installed, before anything is fetched or computed."""

from elder_jax import extras
from elder_jax.devices import hosts
from elder_jax.hf import folder as model_folder
from elder_jax.recipes import find_recipe
from elder_jax.run.config import Config
from elder_jax.text import blend
from elder_jax.text import documents
from elder_jax.text import hub
from elder_jax.text import reading


def check(config: Config):
  """Raises InputError, in all processes, for a package that is missing, with the extra that installs it."""
  hosts.leader_first(lambda: _check(config))


def _check(config: Config):
  for name in ('model', 'teacher'):
    if model_folder.is_gguf(value := getattr(config.paths, name)):
      extras.require('gguf', 'a .gguf file', name, value)
  if config.evaluation.tasks:
    extras.require('lm_eval', 'zero-shot evaluation', 'tasks', config.evaluation.tasks)
  if _trains_on_text(config):
    for part in blend.parts_of(config.data.train_data, 'train_data'):
      _check_text(part.setting, part.source)
  for name, source in config.evaluation.eval_data.items():
    _check_text(f'eval_data={name}', source)
  if setting := _drawn(config):
    extras.require('matplotlib', 'the plot of this run', setting, config.flat()[setting])


def _trains_on_text(config: Config) -> bool:
  """Whether the run may read --train_data: by its methods and recipes, before the number of layers is known."""
  if not config.data.train_data:
    return False
  reads = any(config.trains(name) or find_recipe(name).reads_text for name in config.recipes())
  return reads or bool(config.methods()) or config.validates()


def _check_text(setting: str, source: str):
  files = documents.list_files(setting, source, say=lambda _: None)
  if not files:
    hub.check_hub_id(setting, source)
  for file in files:
    reading.check_package(setting, source, file)


def _drawn(config: Config) -> str:
  """The setting for which the run draws a plot: sweep.svg or curve.svg. Empty: it draws none."""
  if len(config.removal.ratio or ()) > 1 and config.evaluation.eval_data:
    return 'ratio'
  if config.validates() and any(config.trains(name) for name in config.recipes()):
    return 'validate_every'
  return ''
