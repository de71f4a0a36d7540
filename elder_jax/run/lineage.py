"""What was done to a model so far: elder_jax.json in an exported folder, a step for each run that it went through."""

import json
import pathlib

from elder_jax.errors import user_path
from elder_jax.hf.source import Source
from elder_jax.log import log
from elder_jax.run.config import Config

NAME = 'elder_jax.json'


def of_source(source: Source) -> list[dict]:
  """The steps of the runs that made a checkpoint; none for one that elder_jax has not written."""
  try:
    steps = json.loads((source.files / NAME).read_text(encoding='utf-8'))['lineage']
  except FileNotFoundError:
    return []
  except (OSError, ValueError, KeyError, TypeError):
    log(f'{source.files / NAME}: cannot be read; what was done to the model before is not told')
    return []
  return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def public_name(model: str) -> str:
  """A hub id as it is; of a path the last part, which says nothing of this machine."""
  is_hub_id = model.count('/') == 1 and not user_path(model).exists() and not model.startswith(('.', '/', '~'))
  return model if is_hub_id else pathlib.PurePath(model).name


def step_of(config: Config, num_layers: int, removed: list[int]) -> dict:
  """What this run does to its model."""
  trains = config.trains(config.removal.recipe)
  return {
    'model': public_name(config.paths.model),
    'layers': num_layers,
    'removed': removed,
    'recipe': config.removal.recipe,
    'teacher': public_name(config.paths.teacher) if trains and config.training.taught else '',
    'tokens': config.steps() * config.data.batch_size * config.data.seq_len if trains else 0,
  }


def sentence(step: dict) -> str:
  """A step as people read it."""
  removed = step.get('removed') or []
  what = f'{len(removed)} of {step.get("layers")} layers removed {removed}' if removed else 'no layer removed'
  trained = f', trained on {step.get("tokens"):,} tokens' if step.get('tokens') else ''
  taught = f' with the predictions of {step["teacher"]}' if step.get('teacher') else ''
  return f'{step.get("model")}: {what}, recipe {step.get("recipe")}{trained}{taught}'
