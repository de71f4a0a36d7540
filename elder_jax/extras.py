"""Packages that only some runs need. Each is in an extra of setup.py and is imported where it is used."""

import importlib.util

from elder_jax.errors import InputError

# Package -> the extra of elder_jax that installs it.
EXTRA_OF = {
  'datasets': 'data',
  'gguf': 'gguf',
  'lm_eval': 'eval',
  'matplotlib': 'report',
  'pyarrow': 'data',
}


def require(package: str, what: str, *setting):
  """Raises InputError unless the package is installed. It is not imported.

  Args:
    what: needs the package; the subject of the sentence.
    setting: name and value of the one that asks for it, if there is one.
  """
  if importlib.util.find_spec(package) is None:
    install = f"pip install 'elder_jax[{EXTRA_OF[package]}]'"
    raise InputError(*setting, f'{what} needs the package {package}; install it with {install}.')
