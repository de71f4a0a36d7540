"""elder_jax: removes layers from a language model with as little damage as possible, and writes a Hugging Face checkpoint.

It has the published methods to choose layers and recipes to compensate for them (METHODS, RECIPES), training, and export.
The functions of the library are in api.py and api_measures.py.
"""

import importlib

__version__ = '0.1.0'

# Public name -> its module, imported on first use, so that `elder_jax --help` does not import jax.
_PUBLIC = {
  **dict.fromkeys('Model load batches choose remove absorb train export'.split(), 'elder_jax.api'),
  **dict.fromkeys('perplexity zero_shot generate'.split(), 'elder_jax.api_measures'),
  'Batches': 'elder_jax.training.batches',
  'Choice': 'elder_jax.recipes.context',
  'Config': 'elder_jax.run.config',
  'ExportMismatch': 'elder_jax.hf.verify',
  'InputError': 'elder_jax.errors',
  'METHODS': 'elder_jax.methods',
  'Method': 'elder_jax.methods.method',
  'NonFiniteLoss': 'elder_jax.training.loop',
  'RECIPES': 'elder_jax.recipes',
  'Recipe': 'elder_jax.recipes.recipe',
  'Sampling': 'elder_jax.text.decoding',
  'TrainSettings': 'elder_jax.training.settings',
}
__all__ = [*_PUBLIC, 'run', '__version__']


def __getattr__(name: str):
  if name == 'run':
    return importlib.import_module('elder_jax.run')  # the package is callable
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
