"""One run, top to bottom: config, prepare, stages, pipeline, report; and the plan of it.

The package can be called: elder_jax.run is this folder as well as the function `run` of the library (api.py).
"""

import sys
import types


class _CallablePackage(types.ModuleType):
  def __call__(self, config) -> dict:
    from elder_jax import api  # above this package, so only when it is called

    return api.run(config)


sys.modules[__name__].__class__ = _CallablePackage
