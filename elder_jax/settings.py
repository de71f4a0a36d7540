"""Settings as fields of frozen dataclasses. A field holds the default, bounds, choices and help.

    @dataclasses.dataclass(frozen=True)
    class Training(settings.Settings):
      lr: float = setting(3e-4, 'Peak learning rate.', least=0.0)

Values are checked when the object is created, both from Python and from the command line. commands/flags.py turns the
fields into flags.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from elder_jax.errors import InputError
from elder_jax.errors import shown


def setting(
  default,
  help: str,
  *,
  flag: str = '',
  choices: tuple = (),
  least: float | None = None,
  most: float | None = None,
  above: float | None = None,
  below: float | None = None,
  repeats: bool = False,
  colon: bool = False,
  rare: bool = False,
) -> Any:
  """Returns a dataclass field.

  Args:
    flag: the name on the command line, in config.json and in errors, if it differs from the field's name.
    least, most: inclusive bounds of a number.
    above, below: exclusive bounds of a number. Every number must be finite, with or without bounds.
    repeats: for a tuple: each element is a flag of its own, and commas are part of the element.
    colon: several numbers may be separated by colons, as in 0.9:0.5, as well as by commas.
    rare: the short --help lists only the name.
  """
  bounds = {'least': least, 'most': most, 'above': above, 'below': below}
  metadata = {'help': help, 'flag': flag, 'choices': tuple(choices), 'repeats': repeats, 'colon': colon, 'rare': rare}
  metadata |= bounds
  if isinstance(default, dict):
    return dataclasses.field(default_factory=default.copy, metadata=metadata)
  return dataclasses.field(default=default, metadata=metadata)


class Settings:
  """Base class of dataclasses whose fields are created by `setting`."""

  def __post_init__(self):
    """Raises InputError for a value of the wrong type, out of bounds, or not among the choices."""
    for field in fields(self):
      value = _normal(getattr(self, field.name))
      object.__setattr__(self, field.name, value)
      _check(name_of(field), value, field)


def fields(settings) -> list[dataclasses.Field]:
  """The fields that were created by `setting`."""
  return [field for field in dataclasses.fields(settings) if 'help' in field.metadata]


def name_of(field: dataclasses.Field) -> str:
  """The name of a setting outside Python: on the command line, in config.json and in errors."""
  return field.metadata['flag'] or field.name


def default_of(field: dataclasses.Field):
  return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def types_of(field: dataclasses.Field) -> tuple:
  """The types that a field may have, without None: (int,) for `int | None`."""
  union = isinstance(field.type, types.UnionType)
  return tuple(t for t in (field.type.__args__ if union else (field.type,)) if t is not types.NoneType)


def _normal(value):
  return tuple(value) if isinstance(value, list) else value


def _check(name: str, value, field: dataclasses.Field):
  optional = isinstance(field.type, types.UnionType) and types.NoneType in field.type.__args__
  if value is None and optional:
    return
  if not any(_is_of(value, t) for t in types_of(field)):
    wanted = ' or '.join(getattr(t, '__name__', str(t)) if not typing.get_args(t) else str(t) for t in types_of(field))
    raise InputError(name, shown(value), f'must be of type {wanted}.')
  if (choices := field.metadata['choices']) and value not in choices:
    known = ', '.join(choice or "''" for choice in choices)
    raise InputError(name, value, f'is not known; choose one of: {known}.')
  for number in value if isinstance(value, tuple) else (value,):
    if isinstance(number, int | float) and not isinstance(number, bool):
      _check_bounds(name, value, number, field.metadata)


def _check_bounds(name: str, value, number: float, bounds):
  least, most, above, below = (bounds[key] for key in ('least', 'most', 'above', 'below'))
  inside = math.isfinite(number)
  inside &= (least is None or number >= least) and (most is None or number <= most)
  inside &= (above is None or number > above) and (below is None or number < below)
  if not inside:
    limits = [f'at least {least}' if least is not None else '', f'above {above}' if above is not None else '']
    limits += [f'at most {most}' if most is not None else '', f'below {below}' if below is not None else '']
    raise InputError(name, value, f'must be {" and ".join(filter(None, limits)) or "finite"}.')


def _is_of(value, wanted) -> bool:
  origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
  if origin is tuple:
    return isinstance(value, tuple) and all(_is_of(v, inner[0]) for v in value)
  if origin is dict:
    return isinstance(value, dict) and all(_is_of(k, inner[0]) and _is_of(v, inner[1]) for k, v in value.items())
  if wanted in (int, float) and isinstance(value, bool):
    return False
  return isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
