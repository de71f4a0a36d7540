"""The history of a model: elder_jax.json in an exported folder has a step for each run."""

import json
import pathlib

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf.source import Source
from elder_jax.log import log
from elder_jax.run.config import Config

NAME = 'elder_jax.json'


def of_folder(folder: pathlib.Path) -> list[dict]:
  """The steps of the runs that made a checkpoint; empty for a checkpoint that elder_jax did not write."""
  path = folder / NAME
  if not path.is_file():
    return []
  try:
    steps = json.loads(path.read_text(encoding='utf-8'))['lineage']
  except (OSError, ValueError, KeyError, TypeError):
    steps = None
  if not isinstance(steps, list) or not all(map(_is_step, steps)):
    log(f'{path}: cannot be read; the history of the model is lost')
    return []
  return steps


def _is_step(step) -> bool:
  if not isinstance(step, dict):
    return False
  removed, numbers = step.get('removed', []), (step.get('layers', 0), step.get('tokens', 0))
  return isinstance(removed, list) and all(isinstance(number, int) for number in (*removed, *numbers))


def kept_layers(config: Config, source: Source, teacher: Source | None) -> list[int] | None:
  """The layers of the teacher that a model still has, by 0-based number, in ascending order; None: not known.

  They come from --kept_layers, else from elder_jax.json in the model's folder, else from the slices of a
  mergekit_config.yml.

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
  """The layers that these steps leave of a model of `total` layers; None if they began with another model."""
  kept = list(range(total))
  for step in steps:
    if step.get('layers') != len(kept) or not isinstance(step.get('removed'), list):
      return None
    kept = [layer for l, layer in enumerate(kept) if l not in step['removed']]
  return kept


def _by_mergekit(source: Source) -> list[int] | None:
  """From the slices of one model, in order: slices: - sources: - layer_range: [0, 12]."""
  import yaml

  try:
    text = (source.files / 'mergekit_config.yml').read_text(encoding='utf-8')
    ranges = [of_slice['sources'][0]['layer_range'] for of_slice in yaml.safe_load(text)['slices']]
    return [l for first, end in ranges for l in range(first, end)]
  except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
    return None


def public_name(model: str) -> str:
  """A hub id, also of a folder in the hub's cache; of any other path the last part, which tells nothing of this machine."""
  if is_hub_id(model) and not user_path(model).exists():
    return model
  path = pathlib.PurePath(model)
  cached = path.parent.parent.name.split('--', 2) if path.parent.name == 'snapshots' else []
  return '/'.join(cached[1:]) if len(cached) == 3 and cached[0] == 'models' else path.name


def is_hub_id(name: str) -> bool:
  """Whether a name has the form owner/name."""
  return name.count('/') == 1 and not name.startswith(('.', '/', '~'))


def original(steps: list[dict]) -> tuple[str, int | None]:
  """(public name, number of layers) of the model that the first step began with."""
  return (str(steps[0].get('model', '')), steps[0].get('layers')) if steps else ('', None)


def step_of(config: Config, num_layers: int, removed: list[int]) -> dict:
  """The step that this run adds."""
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
  """A step in words."""
  removed = step.get('removed') or []
  what = f'{len(removed)} of {step.get("layers")} layers removed ({ranges(removed)})' if removed else 'no layer removed'
  trained = f', trained on {step.get("tokens"):,} tokens' if step.get('tokens') else ''
  taught = f' with {step["teacher"]} as teacher' if step.get('teacher') else ''
  return f'{step.get("model")}: {what}, recipe {step.get("recipe")}{trained}{taught}'


def ranges(layers: list[int]) -> str:
  """Numbers of layers with contiguous ones joined, as in 3, 12-18."""
  runs: list[list[int]] = []
  for l in sorted(layers):
    if runs and l == runs[-1][-1] + 1:
      runs[-1].append(l)
    else:
      runs.append([l])
  return ', '.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)
