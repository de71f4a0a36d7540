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


def is_installed(package: str) -> bool:
  """Whether the package can be imported. It is not imported."""
  return importlib.util.find_spec(package) is not None


def require(package: str, what: str, *setting):
  """Raises InputError unless the package is installed. It is not imported.

  Args:
    what: needs the package; the subject of the sentence.
    setting: name and value of the one that asks for it, if there is one.
  """
  if not is_installed(package):
    install = f"pip install 'elder_jax[{EXTRA_OF[package]}]'"
    raise InputError(*setting, f'{what} needs the package {package}; install it with {install}.')
