"""What the source says of itself that the model card repeats: its id on the hub, its licence, its languages."""

import pathlib
import re

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import folder as model_folder
from elder_jax.log import log
from elder_jax.run import lineage

_LICENCE = ('license', 'license_name', 'license_link')
# Fields of a GGUF file that name the repository that it was made from, the nearest one first.
_REPOSITORY = (
  'general.source.huggingface.repository general.source.repo_url general.source.url general.base_model.0.repo_url'
).split()


def read(model: str, files: pathlib.Path) -> dict:
  """{'base_model', 'license', 'license_name', 'license_link', 'language'}, as far as they are known.

  Args:
    model: --model.
    files: its folder.
  """
  steps = lineage.of_folder(files)
  first = lineage.original(steps)[0] or lineage.public_name(model)
  if model_folder.is_gguf(model):
    found = _of_gguf(user_path(model))
  else:
    card = _front_matter(files / 'README.md')
    found = {key: value for key in _LICENCE if isinstance(value := card.get(key), str) and value}
    found['language'] = _texts(card.get('language'))
    # A card of elder_jax names the original; any other card names what the source itself was made from.
    found['base_model'] = next(iter(_texts(card.get('base_model'))), '') if steps else ''
  if lineage.is_hub_id(first):
    found['base_model'] = first
  return {key: value for key, value in found.items() if value}


def _front_matter(path: pathlib.Path) -> dict:
  """The metadata of a model card; empty where there is none."""
  from huggingface_hub import metadata_load  # here, since it takes a second to import
  import yaml

  if not path.is_file():
    return {}
  try:
    return metadata_load(path) or {}
  except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
    log(f'{path}: the metadata cannot be read ({reason(e)}); the model card of the export names no licence')
    return {}


def _of_gguf(path: pathlib.Path) -> dict:
  from elder_jax.hf.gguf.source import read_raw  # not at the top: it needs the package gguf

  try:
    fields = read_raw(path)[0]
  except InputError:  # reported where the model is opened
    return {}
  names = {'license': 'general.license', 'license_name': 'general.license.name', 'license_link': 'general.license.link'}
  found = {key: value for key, field in names.items() if isinstance(value := fields.get(field), str)}
  found['language'] = _texts(fields.get('general.languages'))
  hub = (
    re.fullmatch(r'(?:https?://(?:huggingface|hf)\.co/)?([\w.-]+/[\w.-]+)/?', str(fields.get(n))) for n in _REPOSITORY
  )
  found['base_model'] = next((match[1] for match in hub if match), '')
  return found


def _texts(value) -> list[str]:
  """The texts of a text or a list. YAML reads `no`, Norwegian, as false."""
  values = value if isinstance(value, list) else [value]
  return [text for v in values if isinstance(text := 'no' if v is False else v, str) and text]
