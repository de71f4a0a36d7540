"""elder_jax: remove layers from a language model with little damage. The library: api.py and api_measures.py."""

import importlib

__version__ = '0.1.0'

# Public name -> where it is. They are imported when they are asked for, so that `elder_jax --help` needs no jax.
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
    return importlib.import_module('elder_jax.run')  # a package that can be called
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
