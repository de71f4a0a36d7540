"""Finds an entry of METHODS or RECIPES by its name, or the user's own by package.module:NAME."""

import importlib
import os
import sys

from elder_jax.errors import InputError
from elder_jax.errors import reason


def find_entry(setting: str, name: str, table: dict, kind: type):
  """Returns an entry of `table`, or the object NAME of an importable module. The current folder is importable.

  Raises:
    InputError: the entry does not exist, or its type is not `kind`, the type of the table's entries.
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
  except Exception as e:  # the user's module may raise anything  # noqa: BLE001
    raise InputError(setting, name, f'cannot be imported ({reason(e)}); check the module and the name.') from e
  if not isinstance(entry, kind):
    raise InputError(
      setting,
      name,
      f'has type {type(entry).__name__}, not {kind.__module__}.{kind.__name__}; give an entry of that type.',
    )
  return entry
