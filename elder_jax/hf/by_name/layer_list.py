"""Where the layers are: a list in the tensors' names, and the part of config.json that says how long it is."""

from collections.abc import Iterable
import re
from typing import Any, NamedTuple

from elder_jax.errors import InputError

DEPTHS = ('num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_decoder_layers', 'decoder_layers', 'depth')
# Of layers that predict further tokens: some models number them after the others.
EXTRAS = ('num_nextn_predict_layers', 'num_mtp_layers')
# Without a number of layers, the length of one of these is it.
KINDS = ('layers_block_type', 'layer_types', 'hybrid_override_pattern')
# Parts of a model that are not its language model, by the names of tensors and of keys.
OTHER = re.compile('vision|visual|image|audio|speech|video|sam_|encoder_config', re.IGNORECASE)


class LayerList(NamedTuple):
  """The layers that are cut."""

  prefix: str  # of the names: model.layers.
  section: tuple[str, ...]  # keys of config.json that lead to the part for these layers
  depth_key: str  # in that part; empty: the length of a list says it
  depth: int

  def layer_of(self, name: str) -> int | None:
    """The number of the layer that a tensor is of; from `depth` on it is an extra one."""
    found = re.match(rf'{re.escape(self.prefix)}(\d+)(\.|$)', name)
    return int(found[1]) if found else None

  def renamed(self, name: str, kept: list[int]) -> str | None:
    """The tensor's name when only the layers `kept` are left; None for one of a layer that goes."""
    layer = self.layer_of(name)
    if layer is None:
      return name
    numbers = [*kept, *range(self.depth, max(self.depth, layer + 1))]
    if layer not in numbers:
      return None
    return f'{self.prefix}{numbers.index(layer)}{name[len(f"{self.prefix}{layer}") :]}'


def find(names: Iterable[str], config: dict, model: str, at: str = '') -> LayerList:
  """The one list of layers that config.json tells the length of.

  Args:
    model: what to call it in an error.
    at: --layers_at, the list's name as in model.language_model.layers; empty: there is only one.
  """
  if config.get('is_encoder_decoder'):
    raise InputError('model', model, 'has an encoder and a decoder; only models with one stack of layers can be cut.')
  lengths = _lists(names)
  if at and f'{at}.' not in lengths:
    raise InputError(
      'layers_at', at, f'is no list of layers in the names of the tensors; there are {_listed(lengths)}.'
    )
  found = [
    LayerList(prefix, *section)
    for prefix, length in lengths.items()
    for section in _sections(config)
    if _fits(prefix, length, section, config) and at in ('', prefix.removesuffix('.'))
  ]
  if not at and len({layers.prefix for layers in found}) > 1:  # a tower for pictures or sound is not meant
    found = [layers for layers in found if not OTHER.search(layers.prefix)] or found
  if len({layers.prefix for layers in found}) > 1:
    told = ', '.join(f'{l.prefix.removesuffix(".")} ({l.depth})' for l in found)
    raise InputError('model', model, f'has several lists of layers: {told}; name the one to cut by --layers_at.')
  if not found:
    raise InputError(
      'layers_at' if at else 'model',
      at or model,
      f'none of the lists in the names of the tensors ({_listed(lengths)}) has the length that config.json gives; use the '
      'config.json of these weights.',
    )
  if len(found) > 1:
    where = ' and '.join('.'.join([*layers.section, layers.depth_key]) for layers in found)
    raise InputError(
      'model', model, f'config.json gives the number of these layers twice ({where}); remove one of them.'
    )
  return found[0]


def part(config: dict, section: tuple[str, ...]) -> dict:
  """The part of config.json that a section leads to."""
  for key in section:
    config = config[key]
  return config


def _lists(names: Iterable[str]) -> dict[str, int]:
  """{prefix: length} of what is numbered from 0 without a gap, by the first number in a name."""
  numbers: dict[str, set[int]] = {}
  for name in names:
    if found := re.match(r'((?:[^.]*\D[^.]*\.)*?)(\d+)(\.|$)', name):
      numbers.setdefault(found[1], set()).add(int(found[2]))
  return {prefix: len(of_list) for prefix, of_list in numbers.items() if of_list == set(range(len(of_list)))}


def _listed(lengths: dict[str, int]) -> str:
  told = [f'{prefix.removesuffix(".")} ({length})' for prefix, length in lengths.items() if length > 1]
  return ', '.join(told[:8]) or 'none'


def _sections(config: dict, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, int]]:
  """(section, key of its depth, depth), of the parts of config.json that have one."""
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
