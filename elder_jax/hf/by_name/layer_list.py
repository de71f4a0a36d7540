"""Finds the list of layers: its prefix in the tensors' names, and the section of config.json that gives its length."""

from collections.abc import Iterable
import re
from typing import Any, NamedTuple

from elder_jax.errors import InputError

DEPTHS = ('num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_decoder_layers', 'decoder_layers', 'depth')
# Numbers of layers that predict further tokens (MTP). Some models number them after the other layers.
EXTRAS = ('num_nextn_predict_layers', 'num_mtp_layers')
# Without a key in DEPTHS, the length of one of these lists is the number of layers.
KINDS = ('layers_block_type', 'layer_types', 'hybrid_override_pattern')
# Matches names of tensors and keys that belong to another part than the language model.
OTHER = re.compile('vision|visual|image|audio|speech|video|sam_|encoder_config', re.IGNORECASE)


class LayerList(NamedTuple):
  """The list of layers to cut."""

  prefix: str  # of the tensors' names, such as 'model.layers.'
  section: tuple[str, ...]  # the keys that lead to the section of config.json for these layers
  depth_key: str  # the key of that section with the depth; empty: the length of a list gives it
  depth: int

  def layer_of(self, name: str) -> int | None:
    """The layer that a tensor belongs to, None if to none; numbers from `depth` on are MTP layers."""
    found = re.match(rf'{re.escape(self.prefix)}(\d+)(\.|$)', name)
    return int(found[1]) if found else None

  def renamed(self, name: str, kept: list[int]) -> str | None:
    """The tensor's name after the removal; None if its layer is removed."""
    layer = self.layer_of(name)
    if layer is None:
      return name
    numbers = [*kept, *range(self.depth, max(self.depth, layer + 1))]
    if layer not in numbers:
      return None
    return f'{self.prefix}{numbers.index(layer)}{name[len(f"{self.prefix}{layer}") :]}'


def find(names: Iterable[str], config: dict, model: str, at: str = '') -> LayerList:
  """The only list of layers whose length config.json gives.

  Args:
    names: of all tensors.
    model: the model's name for errors.
    at: the value of --layers_at, such as model.language_model.layers; empty: the model has only one list.

  Raises:
    InputError: there is no such list, or there are several, or the model has an encoder and a decoder.
  """
  if config.get('is_encoder_decoder'):
    raise InputError('model', model, 'has an encoder and a decoder; give a model with one stack of layers.')
  lengths = _lists(names)
  if at and f'{at}.' not in lengths:
    raise InputError('layers_at', at, f'no list of layers has this name; give one of {_listed(lengths)}.')
  found = [
    LayerList(prefix, *section)
    for prefix, length in lengths.items()
    for section in _sections(config)
    if _fits(prefix, length, section, config) and at in ('', prefix.removesuffix('.'))
  ]
  if not at and len({layers.prefix for layers in found}) > 1:  # the language model is meant, not an encoder
    found = [layers for layers in found if not OTHER.search(layers.prefix)] or found
  if len({layers.prefix for layers in found}) > 1:
    lists = ', '.join(f'{l.prefix.removesuffix(".")} ({l.depth})' for l in found)
    raise InputError('model', model, f'has several lists of layers: {lists}; choose one with --layers_at.')
  if not found:
    raise InputError(
      'layers_at' if at else 'model',
      at or model,
      f'no list of layers in the tensor names ({_listed(lengths)}) has the length that config.json gives; use the '
      'config.json of these weights.',
    )
  if len(found) > 1:
    where = ' and '.join('.'.join([*layers.section, layers.depth_key]) for layers in found)
    raise InputError(
      'model', model, f'config.json gives the number of these layers twice ({where}); delete one of them.'
    )
  return found[0]


def part(config: dict, section: tuple[str, ...]) -> dict:
  """The section of config.json at these keys."""
  for key in section:
    config = config[key]
  return config


def _lists(names: Iterable[str]) -> dict[str, int]:
  """{prefix: length} of all lists that are numbered from 0 without a gap; the first number in a name counts."""
  numbers: dict[str, set[int]] = {}
  for name in names:
    if found := re.match(r'((?:[^.]*\D[^.]*\.)*?)(\d+)(\.|$)', name):
      numbers.setdefault(found[1], set()).add(int(found[2]))
  return {prefix: len(of_list) for prefix, of_list in numbers.items() if of_list == set(range(len(of_list)))}


def _listed(lengths: dict[str, int]) -> str:
  lists = [f'{prefix.removesuffix(".")} ({length})' for prefix, length in lengths.items() if length > 1]
  return ', '.join(lists[:8]) or 'none'


def _sections(config: dict, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, int]]:
  """(section, key of the depth, depth) of each section of config.json that has a depth."""
  found = [
    (path, key, value)
    for key in DEPTHS
    if isinstance(value := config.get(key), int) and not isinstance(value, bool) and value > 0
  ][:1]
  if not found:
    found = [(path, '', len(value)) for key in KINDS if isinstance(value := config.get(key), list | str) and value][:1]
  for key, value in config.items():
    if isinstance(value, dict) and len(path) < 3 and key != 'quantization_config':
      found += _sections(value, (*path, key))
  return found


def _fits(prefix: str, length: int, section: tuple[tuple[str, ...], str, int], config: dict[str, Any]) -> bool:
  path, _, depth = section
  if bool(OTHER.search(prefix)) != any(OTHER.search(key) for key in path):
    return False
  here = part(config, path)
  extras = max((n for key in EXTRAS if isinstance(n := here.get(key), int)), default=0)
  return length in (depth, depth + extras)
