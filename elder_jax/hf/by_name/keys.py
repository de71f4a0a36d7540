"""Edits config.json for fewer layers. Keys that describe layers have a rule; unknown ones raise InputError."""

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
  """The removal, as the rules see it."""

  kept: list[int]
  depth: int  # before the removal
  config: dict  # the section of config.json that describes these layers
  expanded: dict  # the same, with the lists that transformers derives from other keys

  def entries(self, value: list) -> list:
    """The entries of the kept layers, of a list with one entry per layer."""
    return [value[l] for l in self.kept]

  def numbers(self, value: list) -> list:
    """Layer numbers after the removal; those of removed layers are dropped."""
    return [self.kept.index(l) for l in value if l in self.kept]

  def below(self, value: int) -> int:
    """How many of the first `value` layers remain; a value of at least `depth` is returned as it is."""
    return value if value >= self.depth else sum(l < value for l in self.kept)


class Refused(Exception):
  """A key cannot describe the remaining layers. The text is a predicate with the fix, without a full stop."""


# ---- rules: (key, value, Cut) -> {key: new value}, of this key and of others that change with it ----


def _below(key: str, value: int, cut: Cut) -> dict:
  return {key: cut.below(value)}


def _up_to(key: str, value: int, cut: Cut) -> dict:
  """The value is the last layer of a range; −1 means the last layer of the model."""
  return {key: value if value < 0 else cut.below(value + 1) - 1}


def _entries(key: str, value, cut: Cut) -> dict:
  if len(value) != cut.depth:
    raise Refused(f'has {len(value)} entries for {cut.depth} layers; correct the list')
  left = cut.entries(list(value))
  return {key: ''.join(left) if isinstance(value, str) else left}


def _numbers(key: str, value: list, cut: Cut) -> dict:
  return {key: cut.numbers(value)}


def _flags_or_numbers(key: str, value: list, cut: Cut) -> dict:
  """Some families list a flag for each layer, others list layer numbers."""
  flags = len(value) == cut.depth and set(value) <= {0, 1}
  return _entries(key, value, cut) if flags else _numbers(key, value, cut)


def _nothing(key: str, value, cut: Cut) -> dict:
  return {key: value}


def _only_one(key: str, value: int, cut: Cut) -> dict:
  if value != 1:
    raise Refused('selects layers by their number, and no other key can list them; this model cannot be cut')
  return {key: value}


def _by_list(name: str) -> Callable:
  """For a key from which transformers derives the list `name`: the list is cut and written, the key stays."""

  def rule(key: str, value, cut: Cut) -> dict:
    if value not in (0, 1) and len(cut.expanded.get(name) or ()) == 0:
      raise Refused(f'defines {name}, which transformers does not derive from it; add {name}')
    return {key: value}

  return rule


def _dense_layers(key: str, value: list, cut: Cut) -> dict:
  """Layers without experts. If decoder_sparse_step adds further ones, its own rule writes the whole list."""
  return {key: cut.numbers(value)} if cut.config.get('decoder_sparse_step') in (None, 1) else {}


def _sparse_step(key: str, value: int, cut: Cut) -> dict:
  """Every n-th layer has experts unless mlp_only_layers names it. If n is not 1, that list takes all other layers."""
  dense = set(cut.config.get('mlp_only_layers') or ()) | {l for l in range(cut.depth) if (l + 1) % max(1, value)}
  return {key: value} if value == 1 else {key: 1, 'mlp_only_layers': cut.numbers(sorted(dense))}


def _period(offset_key: str) -> Callable:
  """Layers l with l % period == offset are special: finds a period and an offset that hold after the removal."""

  def rule(key: str, value: int, cut: Cut) -> dict:
    offset = cut.config.get(offset_key) or 0
    marked = [l % value == offset for l in cut.kept]
    for period in range(1, len(marked) + 2):
      for at in range(period):
        if marked == [i % period == at for i in range(len(marked))]:
          return {key: period, offset_key: at}
    raise Refused('cannot describe the remaining layers, which have no regular period; remove other layers')

  return rule


def _shared_cache(key: str, value: int, cut: Cut) -> dict:
  """The last `value` layers read the keys and values of an earlier layer of their kind, which must not be removed."""
  first = cut.depth - value
  kinds = cut.expanded.get('layer_types')
  if value and kinds is None:
    raise Refused('shares keys and values between layers of a kind, and layer_types is missing; add it')
  for kind in set(kinds[first:]) if value else ():
    origin = max((l for l in range(first) if kinds[l] == kind), default=None)
    if origin is None:
      raise Refused(f'leaves no layer of the kind {kind} to share keys and values from; correct config.json')
    if origin not in cut.kept:
      raise Refused(f'makes the last layers read the keys and values of layer {origin}; keep that layer')
  return {key: sum(l >= first for l in cut.kept)}


def _only_zero(key: str, value, cut: Cut) -> dict:
  if value:
    raise Refused('gives each layer a slice of a shared tensor, which is copied whole; this model cannot be cut')
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
  **dict.fromkeys(('attn_layer_offset', 'expert_layer_offset'), _nothing),  # set by the rule of the period
  'num_kv_shared_layers': _shared_cache,
  **dict.fromkeys(('hidden_size_per_layer_input', 'num_layers_per_block'), _only_zero),
  # These do not depend on layer numbers, although their names look like it.
  **dict.fromkeys(
    (*EXTRAS, 'mtp_layers_block_type', 'vocab_size_per_layer_input', 'mtp_hybrid_override_pattern'), _nothing
  ),
  **dict.fromkeys(
    'attention_block_size block_size mamba_chunk_size time_step_limit router_layer_freq'.split(), _nothing
  ),
}
# Names of keys that may describe layers. A number under any other name is copied.
_SUSPECT = re.compile(
  r'layer|num_block|n_block|block_(type|kind)|pattern|interval|period|every|_idxs?$|ind(ex|ices)|freq$|_step$|depth|stage'
)
# Names of lists that never describe layers, whatever their length.
_OTHER_LISTS = re.compile(
  r'token|architectures|multipliers|_limit$|section|suppress|bad_words|languages|labels?$|head_dims'
)


def cut_config(config: dict, layers: LayerList, kept: list[int], model: str) -> dict:
  """config.json for the layers `kept`; keys that do not describe layers are copied.

  Raises:
    InputError: a key that may describe layers is unknown, or cannot describe the remaining ones.
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
      raise InputError('model', model, f'config.json: {name}={shown(value)} {e}.') from e
  for key in DEPTHS if layers.depth_key else ():
    if old.get(key) == layers.depth:
      section[key] = len(kept)
  _write_lists(new, layers, cut)
  if 'quantization_config' in new:
    new['quantization_config'] = renamed_strings(new['quantization_config'], layers, kept, model)
  if transformers_has(config):  # the checkpoint's own code is not needed
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
    raise Refused('is an unknown key that may describe layers; delete it if it does not')
  return {}


def _list_changes(key: str, value: list, cut: Cut) -> dict:
  if _OTHER_LISTS.search(key):
    return {}
  if len(value) == cut.depth:
    if _SUSPECT.search(key) or key in ('intermediate_size', 'num_key_value_heads', 'num_attention_heads', 'head_dim'):
      return {key: cut.entries(value)}
    raise Refused('is an unknown list with one entry per layer; delete it if it does not describe layers')
  if value and _SUSPECT.search(key):
    raise Refused('is an unknown list that may describe layers; delete it if it does not')
  return {}


# ---- lists that transformers derives from other keys ----


def transformers_has(config: dict) -> bool:
  """Whether the installed transformers supports the model_type."""
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds

  return config.get('model_type') in CONFIG_MAPPING


def _lists_of(config: dict, layers: LayerList) -> dict:
  """The section of config.json as transformers completes it; unchanged if transformers does not support the model."""
  given = part(config, layers.section)
  if not transformers_has(config):
    return dict(given)
  completed = transformers_config(config)
  for key in layers.section:
    completed = getattr(completed, key)
  return completed.to_dict() | {key: value for key, value in given.items() if value not in (None, [])}


def transformers_config(config: dict):
  """The transformers config object of a config.json. Raises whatever transformers raises."""
  from transformers.models.auto.configuration_auto import CONFIG_MAPPING

  with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    return CONFIG_MAPPING[config['model_type']].from_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers():
  """Silences the warnings of transformers about keys of config.json."""
  level, logger = logging.root.manager.disable, logging.getLogger('transformers')
  logging.disable(logging.CRITICAL)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield logger
  finally:
    logging.disable(level)


def _write_lists(new: dict, layers: LayerList, cut: Cut):
  """Writes a list if transformers would derive another one for fewer layers."""
  for key, value in cut.expanded.items():
    if cut.config.get(key) or not isinstance(value, list) or key not in RULES or not value:
      continue
    section = part(new, layers.section)
    wanted = RULES[key](key, value, cut)[key]
    if (_lists_of(new, layers).get(key) or []) != wanted:
      section[key] = wanted


# ---- layer names within strings ----


def renamed_strings(value, layers: LayerList, kept: list[int], model: str):
  """A JSON value with layer names renumbered after the removal; entries of removed layers are dropped.

  Raises:
    InputError: a string names layers by a regular expression.
  """
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
      'model',
      model,
      f'its quantisation config names layers by the pattern {shown(value)}, which cannot be renumbered; list the layers.',
    )
  return value
