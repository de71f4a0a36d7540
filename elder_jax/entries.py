"""Entries of the tables METHODS and RECIPES, by name; or of the user's own, by package.module:NAME."""

import importlib
import os
import sys

from elder_jax.errors import InputError
from elder_jax.errors import reason


def find_entry(setting: str, name: str, table: dict, kind: type):
  """The entry of `table`, or the object NAME of an importable module; the current folder counts as importable.

  Raises:
    InputError: there is none, or it is not of the `kind` that the table holds.
  """
  if name in table:
    return table[name]
  module, colon, attribute = name.partition(':')
  if not (colon and module and attribute):
    raise InputError(
      setting, name, f'is not known; choose one of: {", ".join(table)}, or give your own as package.module:NAME.'
    )
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())
  try:
    entry = getattr(importlib.import_module(module), attribute)
  except Exception as e:  # the module is the user's: of any kind  # noqa: BLE001
    raise InputError(setting, name, f'cannot be imported ({reason(e)}); check the module and the name.') from e
  if not isinstance(entry, kind):
    raise InputError(
      setting,
      name,
      f'is a {type(entry).__name__}, not a {kind.__module__}.{kind.__name__}; give an entry of that type.',
    )
  return entry
