"""What was done to a model so far: elder_jax.json in an exported folder, a step for each run that it went through."""

import json
import pathlib

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf.source import Source
from elder_jax.log import log
from elder_jax.run.config import Config

NAME = 'elder_jax.json'


def of_folder(folder: pathlib.Path) -> list[dict]:
  """The steps of the runs that made a checkpoint; none for one that elder_jax has not written."""
  try:
    steps = json.loads((folder / NAME).read_text(encoding='utf-8'))['lineage']
  except FileNotFoundError:
    return []
  except (OSError, ValueError, KeyError, TypeError):
    log(f'{folder / NAME}: cannot be read; what was done to the model before is not told')
    return []
  return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def kept_layers(config: Config, source: Source, teacher: Source | None) -> list[int] | None:
  """The layers of the teacher that a model has, by 0-based number in its order; None: not known.

  By --kept_layers, by what elder_jax has written into the model's folder, or by a mergekit_config.yml of slices.

  Raises:
    InputError: --kept_layers does not fit the two models.
  """
  if teacher is None:
    return None
  given, total = config.paths.kept_layers, teacher.num_layers
  if given is not None:
    if len(given) != source.num_layers or sorted(set(given)) != list(given) or given[-1] >= total:
      raise InputError(
        'kept_layers',
        given,
        f'must name {source.num_layers} of the layers 0 to {total - 1} of --teacher, in ascending order.',
      )
    return list(given)
  if source.num_layers == total:
    return list(range(total))
  for found in (kept_by(of_folder(source.files), total), _by_mergekit(source)):
    if found and len(found) == source.num_layers and found[-1] < total:
      return found
  return None


def kept_by(steps: list[dict], total: int) -> list[int] | None:
  """The layers of a model of `total` layers that these steps leave; None where they were made from another one."""
  kept = list(range(total))
  for step in steps:
    if step.get('layers') != len(kept) or not isinstance(step.get('removed'), list):
      return None
    kept = [layer for l, layer in enumerate(kept) if l not in step['removed']]
  return kept


def _by_mergekit(source: Source) -> list[int] | None:
  """Of slices of one model, one after another: slices: - sources: - layer_range: [0, 12]."""
  import yaml

  try:
    text = (source.files / 'mergekit_config.yml').read_text(encoding='utf-8')
    ranges = [of_slice['sources'][0]['layer_range'] for of_slice in yaml.safe_load(text)['slices']]
    return [l for first, end in ranges for l in range(first, end)]
  except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
    return None


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
