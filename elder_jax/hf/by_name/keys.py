"""config.json with fewer layers: what each key that tells something of layers becomes. What is not known is refused."""

from collections.abc import Callable
import contextlib
import copy
import io
import json
import logging
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.hf.by_name.layer_list import DEPTHS
from elder_jax.hf.by_name.layer_list import EXTRAS
from elder_jax.hf.by_name.layer_list import LayerList
from elder_jax.hf.by_name.layer_list import part


class Cut(NamedTuple):
  """What a rule works with."""

  kept: list[int]
  depth: int
  config: dict  # the part of config.json, whole
  expanded: dict  # the same with the lists that transformers makes of other keys

  def entries(self, value: list) -> list:
    return [value[l] for l in self.kept]

  def numbers(self, value: list) -> list:
    """Numbers of layers as they are after the removal."""
    return [self.kept.index(l) for l in value if l in self.kept]

  def below(self, value: int) -> int:
    """How many of the first `value` layers are left; of a bound beyond the last layer that bound."""
    return value if value >= self.depth else sum(l < value for l in self.kept)


class Refused(Exception):
  """Why a key cannot be made right."""


# ---- rules: (value, Cut) -> {key: new value} besides the key's own ----


def _below(key: str, value: int, cut: Cut) -> dict:
  return {key: cut.below(value)}


def _up_to(key: str, value: int, cut: Cut) -> dict:
  """The last layer of a range, −1 for the model's last."""
  return {key: value if value < 0 else cut.below(value + 1) - 1}


def _entries(key: str, value, cut: Cut) -> dict:
  if len(value) != cut.depth:
    raise Refused(f'has {len(value)} entries for {cut.depth} layers')
  left = cut.entries(list(value))
  return {key: ''.join(left) if isinstance(value, str) else left}


def _numbers(key: str, value: list, cut: Cut) -> dict:
  return {key: cut.numbers(value)}


def _flags_or_numbers(key: str, value: list, cut: Cut) -> dict:
  """A flag for each layer in some families, numbers of layers in others."""
  flags = len(value) == cut.depth and set(value) <= {0, 1}
  return _entries(key, value, cut) if flags else _numbers(key, value, cut)


def _nothing(key: str, value, cut: Cut) -> dict:
  return {key: value}


def _only_one(key: str, value: int, cut: Cut) -> dict:
  if value != 1:
    raise Refused('is a pattern over the numbers of the layers, for which config.json has no list')
  return {key: value}


def _by_list(name: str) -> Callable:
  """A rule by which a list is made where none is given; the list is cut and, where needed, written."""

  def rule(key: str, value, cut: Cut) -> dict:
    if value not in (0, 1) and len(cut.expanded.get(name) or ()) == 0:
      raise Refused(f'is the rule of {name}, which is not given, and transformers does not make it')
    return {key: value}

  return rule


def _dense_layers(key: str, value: list, cut: Cut) -> dict:
  """Layers without experts; where decoder_sparse_step names further ones its rule writes the whole list."""
  return {key: cut.numbers(value)} if cut.config.get('decoder_sparse_step') in (None, 1) else {}


def _sparse_step(key: str, value: int, cut: Cut) -> dict:
  """Every n-th layer has experts, unless mlp_only_layers names it: where n is not 1, that list names all others."""
  dense = set(cut.config.get('mlp_only_layers') or ()) | {l for l in range(cut.depth) if (l + 1) % max(1, value)}
  return {key: value} if value == 1 else {key: 1, 'mlp_only_layers': cut.numbers(sorted(dense))}


def _period(offset_key: str) -> Callable:
  """Layers l with l % period == offset: another period and offset, where these say the same of what is left."""

  def rule(key: str, value: int, cut: Cut) -> dict:
    offset = cut.config.get(offset_key) or 0
    marked = [l % value == offset for l in cut.kept]
    for period in range(1, len(marked) + 2):
      for at in range(period):
        if marked == [i % period == at for i in range(len(marked))]:
          return {key: period, offset_key: at}
    raise Refused('cannot say which of the layers that are left are of this kind')

  return rule


def _shared_cache(key: str, value: int, cut: Cut) -> dict:
  """The last layers read keys and values of the last layer of their kind before them, which therefore has to stay."""
  first = cut.depth - value
  kinds = cut.expanded.get('layer_types')
  if value and kinds is None:
    raise Refused('shares keys and values of layers whose kinds are not given')
  for kind in set(kinds[first:]) if value else ():
    giver = max((l for l in range(first) if kinds[l] == kind), default=None)
    if giver is None or giver not in cut.kept:
      raise Refused(f'the last layers read the keys and values of layer {giver}; keep it')
  return {key: sum(l >= first for l in cut.kept)}


def _only_zero(key: str, value, cut: Cut) -> dict:
  if value:
    raise Refused('gives layers a part of a tensor that all of them share, which is not cut')
  return {key: value}


RULES: dict[str, Callable[[str, Any, Cut], dict]] = {
  **dict.fromkeys(
    'first_k_dense_replace num_dense_layers n_dense_layers num_dense_decoder_layers max_window_layers '
    'moe_layer_start_index'.split(),
    _below,
  ),
  'moe_layer_end_index': _up_to,
  **dict.fromkeys(
    'layer_types layers_block_type mlp_layer_types attention_types activation_sparsity_pattern '
    'hybrid_override_pattern hybrid_layer_pattern layer_kinds attn_type_list no_rope_layer_flags'.split(),
    _entries,
  ),
  **dict.fromkeys(
    'full_attn_idxs full_attention_idxs attn_layer_indices moe_layers global_attn_layers '
    'sliding_window_layers cross_attention_layers attn_layer_idx'.split(),
    _numbers,
  ),
  'mlp_only_layers': _dense_layers,
  'no_rope_layers': _flags_or_numbers,
  **dict.fromkeys(
    'full_attention_interval sliding_window_pattern _sliding_window_pattern global_attn_every_n_layers '
    'layer_pattern'.split(),
    _by_list('layer_types'),
  ),
  'no_rope_layer_interval': _by_list('no_rope_layers'),
  'interleave_moe_layer_step': _by_list('moe_layers'),
  'decoder_sparse_step': _sparse_step,
  **dict.fromkeys(('moe_layer_freq', 'moe_layer_interval', 'moe_every_n_layers', 'expert_interval'), _only_one),
  'attn_layer_period': _period('attn_layer_offset'),
  'expert_layer_period': _period('expert_layer_offset'),
  **dict.fromkeys(('attn_layer_offset', 'expert_layer_offset'), _nothing),  # by the rule of the period
  'num_kv_shared_layers': _shared_cache,
  **dict.fromkeys(('hidden_size_per_layer_input', 'num_layers_per_block'), _only_zero),
  # Of no layer's number, whatever they are called.
  **dict.fromkeys(
    (*EXTRAS, 'mtp_layers_block_type', 'vocab_size_per_layer_input', 'mtp_hybrid_override_pattern'), _nothing
  ),
  **dict.fromkeys(
    'attention_block_size block_size mamba_chunk_size time_step_limit router_layer_freq'.split(), _nothing
  ),
}
# What may say something of layers by its name; other numbers do not.
_SUSPECT = re.compile(
  r'layer|num_block|n_block|block_(type|kind)|pattern|interval|period|every|_idxs?$|ind(ex|ices)|freq$|_step$|depth|stage'
)
# Lists that are of no layers, however long.
_OTHER_LISTS = re.compile(
  r'token|architectures|multipliers|_limit$|section|suppress|bad_words|languages|labels?$|head_dims'
)


def cut_config(config: dict, layers: LayerList, kept: list[int], model: str) -> dict:
  """config.json for the layers `kept`, all other keys as they are.

  Raises:
    InputError: a key that may tell of layers is not known, or cannot be made right.
  """
  new = copy.deepcopy(config)
  section = part(new, layers.section)
  old, expanded = part(config, layers.section), _lists_of(config, layers)
  cut = Cut(kept, layers.depth, old, expanded)
  for key, value in old.items():
    try:
      section |= _changes(key, value, cut)
    except Refused as e:
      name = '.'.join([*layers.section, key])
      raise InputError('model', model, f'config.json: {name}={shown(value)} {e}; these layers cannot be cut.') from e
  for key in DEPTHS if layers.depth_key else ():
    if old.get(key) == layers.depth:
      section[key] = len(kept)
  _write_lists(new, layers, cut)
  if 'quantization_config' in new:
    new['quantization_config'] = renamed_strings(new['quantization_config'], layers, kept, model)
  if transformers_has(config):  # no code of a stranger is needed
    new.pop('auto_map', None)
  return new


def _changes(key: str, value, cut: Cut) -> dict:
  if key in RULES and value is not None and value != []:
    return RULES[key](key, value, cut)
  if key in RULES or key in DEPTHS:
    return {}
  if isinstance(value, list):
    return _list_changes(key, value, cut)
  if (
    isinstance(value, int) and not isinstance(value, bool) and _SUSPECT.search(key) and 'token' not in key and value > 1
  ):
    raise Refused('may tell of layers, and is not known here')
  return {}


def _list_changes(key: str, value: list, cut: Cut) -> dict:
  if _OTHER_LISTS.search(key):
    return {}
  if len(value) == cut.depth:
    if _SUSPECT.search(key) or key in ('intermediate_size', 'num_key_value_heads', 'num_attention_heads', 'head_dim'):
      return {key: cut.entries(value)}
    raise Refused('has as many entries as there are layers, and is not known here')
  if value and _SUSPECT.search(key):
    raise Refused('may be a list of layers, and is not known here')
  return {}


# ---- lists that transformers makes of other keys ----


def transformers_has(config: dict) -> bool:
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds

  return config.get('model_type') in CONFIG_MAPPING


def _lists_of(config: dict, layers: LayerList) -> dict:
  """The part of config.json as transformers completes it; the part itself where transformers does not know the model."""
  given = part(config, layers.section)
  if not transformers_has(config):
    return dict(given)
  made = transformers_config(config)
  for key in layers.section:
    made = getattr(made, key)
  return made.to_dict() | {key: value for key, value in given.items() if value not in (None, [])}


def transformers_config(config: dict):
  """transformers' own object of a config.json. Raises what transformers raises."""
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING

  with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    return CONFIG_MAPPING[config['model_type']].from_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers():
  """Without what it has to say of keys."""
  level, logger = logging.root.manager.disable, logging.getLogger('transformers')
  logging.disable(logging.CRITICAL)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield logger
  finally:
    logging.disable(level)


def _write_lists(new: dict, layers: LayerList, cut: Cut):
  """Puts lists in place that transformers would make otherwise for fewer layers."""
  for key, value in cut.expanded.items():
    if cut.config.get(key) or not isinstance(value, list) or key not in RULES or not value:
      continue
    section = part(new, layers.section)
    wanted = RULES[key](key, value, cut)[key]
    if (_lists_of(new, layers).get(key) or []) != wanted:
      section[key] = wanted


# ---- names of layers within strings ----


def renamed_strings(value, layers: LayerList, kept: list[int], model: str):
  """A JSON value in which names of layers are those after the removal; entries of layers that go are left out."""
  if isinstance(value, str):
    return _renamed_string(value, layers, kept, model)
  if isinstance(value, list):
    return [v for v in (renamed_strings(v, layers, kept, model) for v in value) if v is not _GONE]
  if isinstance(value, dict):
    pairs = [
      (renamed_strings(k, layers, kept, model), renamed_strings(v, layers, kept, model)) for k, v in value.items()
    ]
    return {k: v for k, v in pairs if _GONE not in (k, v)}
  return value


_GONE: Any = '\0 of a layer that is removed'


def _renamed_string(value: str, layers: LayerList, kept: list[int], model: str) -> str:
  last = layers.prefix.removesuffix('.').rpartition('.')[2]
  found = re.fullmatch(rf'((?:[\w.]*\.)?{re.escape(last)}\.)(\d+)((?:\.[\w.*]*)?)', value)
  if found and int(found[2]) < layers.depth:
    layer = int(found[2])
    return f'{found[1]}{kept.index(layer)}{found[3]}' if layer in kept else _GONE
  if found:
    return f'{found[1]}{int(found[2]) - layers.depth + len(kept)}{found[3]}'
  if re.search(rf'{re.escape(last)}\\?\.[\[(]?\d', value):
    raise InputError(
      'model', model, f'its quantisation names layers by the pattern {shown(value)}, which cannot be renumbered.'
    )
  return value
