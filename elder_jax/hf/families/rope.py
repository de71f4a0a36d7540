"""Rotary position embedding: the frequencies that a config.json defines."""

import math
import sys
from typing import NamedTuple

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import shown


class Rope(NamedTuple):
  """The frequencies of one kind of layer.

  freq_H: radians per position of each rotated pair.
  scale: factor on cosine and sine.
  far_H: frequencies for texts of more than `near` tokens; empty: the same.
  until: number of positions for which the table is valid; 0: any.
  """

  freq_H: tuple[float, ...]
  scale: float = 1.0
  far_H: tuple[float, ...] = ()
  near: int = 0
  until: int = 0

  def without_positions(self) -> 'Rope':
    """A table with all frequencies 0, for layers without positions."""
    return Rope((0.0,) * len(self.freq_H))


def features(*ropes: Rope) -> dict:
  """The arguments of Spec for one table per kind of layer."""
  found: dict = {'rope_freq_RH': tuple(rope.freq_H for rope in ropes)}
  if any(rope.scale != 1 for rope in ropes):
    found['rope_scale_R'] = tuple(rope.scale for rope in ropes)
  if far := [rope for rope in ropes if rope.far_H]:
    if len({rope.near for rope in far}) > 1:
      raise InputError(
        'config.json: original_max_position_embeddings differs between kinds of layers; correct the file.'
      )
    found |= {'rope_far_RH': tuple(rope.far_H or rope.freq_H for rope in ropes), 'rope_near': far[0].near}
  if ends := [rope.until for rope in ropes if rope.until]:
    found['rope_until'] = min(ends)
  return found


# Type -> (required keys, optional keys).
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  'default': ((), ()),
  'linear': (('factor',), ()),
  'dynamic': (('factor',), ('original_max_position_embeddings',)),
  'llama3': (('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'), ()),
  'yarn': (
    ('factor',),
    (
      'original_max_position_embeddings',
      'attention_factor',
      'beta_fast',
      'beta_slow',
      'mscale',
      'mscale_all_dim',
      'truncate',
    ),
  ),
  'longrope': (
    ('short_factor', 'long_factor'),
    ('original_max_position_embeddings', 'factor', 'attention_factor'),
  ),
}
_NAMES = {'su': 'longrope'}  # the name in Phi-3's first files


def table(rotated: int, theta: float, scaling: dict, config: dict | None = None) -> Rope:
  """The frequencies, as in transformers' modeling_rope_utils.py.

  Args:
    rotated: dimensions of a head that are rotated; there are half as many frequencies.
    theta: the base.
    scaling: rope_type and the keys that belong to it.
    config: config.json, for its numbers of positions.

  Raises:
    InputError: the type or a key is unknown, or the frequencies are not finite.
  """
  rope = dict(scaling)
  kind = rope.pop('rope_type', rope.pop('type', 'default'))
  rope.pop('type', None)
  rope = {key: value for key, value in rope.items() if value is not None}
  kind = _NAMES.get(kind, kind) if isinstance(kind, str) else kind
  if kind not in list(_KEYS):  # a list, because kind may not be hashable
    *others, last = _KEYS
    raise InputError(
      f'config.json: rope type {shown(kind)} is not supported; use a checkpoint with {", ".join(others)} or {last}.'
    )
  needed, optional = _KEYS[kind]
  if unknown := sorted(set(rope) - {*needed, *optional}):
    raise InputError(
      f'config.json: rope scaling key {shown(unknown[0])} is not known for rope type {kind!r}; delete it.'
    )
  with np.errstate(divide='ignore', over='ignore', invalid='ignore'):  # the result is checked below
    found = _RULES[kind](rotated, theta, rope, config or {})
  if not np.isfinite([*found.freq_H, *found.far_H, found.scale]).all():
    raise InputError('config.json: rope_theta and rope scaling give frequencies that are not finite; correct the file.')
  return found


def of_text(config: dict) -> dict:
  """config.json without mrope_section, which splits the positions of image tokens in three.

  For text, the three positions are equal.
  """
  return config | {key: _plain_of(config[key]) for key in ('rope_scaling', 'rope_parameters') if key in config}


def _plain_of(table):
  if not isinstance(table, dict) or 'mrope_section' not in table:
    return table
  plain = {key: value for key, value in table.items() if key not in ('mrope_section', 'mrope_interleaved')}
  for key in ('type', 'rope_type'):
    if plain.get(key) in ('mrope', 'default'):
      del plain[key]
  return plain or None


def above_0(key, value) -> float:
  """The value as a number above 0. Raises InputError if it is none."""
  if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
    raise InputError(f'config.json: {key}={shown(value)} must be a number above 0; correct the file.')
  return float(value)


def _plain(rotated: int, theta: float) -> np.ndarray:
  # Rounded to float32 where transformers does (torch computes the power in float64), so that far positions agree.
  exponent_H = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
  return (theta ** exponent_H.astype(np.float64)).astype(np.float32)


def _tuple(freq_H: np.ndarray) -> tuple[float, ...]:
  return tuple(float(f) for f in freq_H.astype(np.float32))


def _default(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  return Rope(_tuple(np.float32(1) / _plain(rotated, theta)))


def _linear(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  return Rope(_tuple(np.float32(1) / _plain(rotated, theta) / np.float32(above_0('factor', rope.get('factor')))))


def _dynamic(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  """Dynamic NTK: nothing is scaled up to max_position_embeddings, and longer texts are not supported."""
  above_0('factor', rope.get('factor'))
  until = int(above_0('max_position_embeddings', config.get('max_position_embeddings')))
  return _default(rotated, theta, {}, config)._replace(until=until)


def _llama3(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  """Llama 3.1: short wavelengths are kept, those beyond the training context stretched, those between interpolated."""
  p = {key: above_0(key, rope.get(key)) for key in _KEYS['llama3'][0]}
  freq_H = np.float32(1) / _plain(rotated, theta)
  wavelength_H = 2 * math.pi / freq_H
  low, high, context = p['low_freq_factor'], p['high_freq_factor'], p['original_max_position_embeddings']
  if high <= low:
    raise InputError(
      f'config.json: rope high_freq_factor={high} must be above low_freq_factor={low}; correct the file.'
    )
  smooth_H = np.clip((context / wavelength_H - low) / (high - low), 0.0, 1.0)
  return Rope(_tuple((1 - smooth_H) * freq_H / p['factor'] + smooth_H * freq_H))


def _original(rope: dict, config: dict) -> float:
  """Positions of the original training, before the context was extended."""
  keys = ('original_max_position_embeddings', 'max_position_embeddings')
  given = (rope.get(keys[0]), config.get(keys[0]), config.get(keys[1]))
  return above_0(keys[0], next((value for value in given if value is not None), None))


def _yarn(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  """YaRN (arXiv 2309.00071): fast frequencies are kept, slow ones divided by the factor, with a ramp between."""
  factor, original = above_0('factor', rope.get('factor')), _original(rope, config)
  fast, slow = above_0('beta_fast', rope.get('beta_fast', 32)), above_0('beta_slow', rope.get('beta_slow', 1))

  def dimension(rotations: float) -> float:
    """The dimension that makes this many rotations over the original context."""
    return rotated * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(fast), dimension(slow)
  if rope.get('truncate', True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rotated - 1)
  high += 0.001 if low == high else 0
  kept_H = 1 - np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low), 0, 1)
  plain_H = _plain(rotated, theta)
  freq_H = (1 / (np.float32(factor) * plain_H)) * (1 - kept_H) + (1 / plain_H) * kept_H
  scale = rope.get('attention_factor')
  if scale is None:
    m, m_all = rope.get('mscale'), rope.get('mscale_all_dim')
    scale = _mscale(factor, m) / _mscale(factor, m_all) if m and m_all else _mscale(factor, 1)
  return Rope(_tuple(freq_H), above_0('attention_factor', scale))


def _mscale(factor: float, m: float) -> float:
  return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0


def _longrope(rotated: int, theta: float, rope: dict, config: dict) -> Rope:
  """LongRoPE (arXiv 2402.13753): each frequency has its own divisor, and another one for long texts."""
  original = _original(rope, config)
  factor = rope.get('factor')
  if factor is None:
    factor = above_0('max_position_embeddings', config.get('max_position_embeddings')) / original
  scale = rope.get('attention_factor')
  if scale is None:
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
  near_H, far_H = (_divided(rotated, theta, rope, key) for key in ('short_factor', 'long_factor'))
  return Rope(near_H, above_0('attention_factor', scale), far_H, int(original))


def _divided(rotated: int, theta: float, rope: dict, key: str) -> tuple[float, ...]:
  factors = rope.get(key)
  if not isinstance(factors, list) or len(factors) != rotated // 2:
    raise InputError(f'config.json: rope scaling {key} must be a list of {rotated // 2} numbers; correct the file.')
  factor_H = np.array([above_0(key, f) for f in factors], np.float32)
  return _tuple(np.float32(1) / (factor_H * _plain(rotated, theta)))


_RULES = {
  'default': _default,
  'linear': _linear,
  'dynamic': _dynamic,
  'llama3': _llama3,
  'yarn': _yarn,
  'longrope': _longrope,
}
