"""A run from start to end: config, prepare, stages, pipeline, report; and its plan.

The package is callable: elder_jax.run is both this folder and the library's function `run` (api.py).
"""

import sys
import types


class _CallablePackage(types.ModuleType):
  def __call__(self, config) -> dict:
    from elder_jax import api  # api imports this package, so it is imported only when called

    return api.run(config)


sys.modules[__name__].__class__ = _CallablePackage
