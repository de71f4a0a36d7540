"""How many layers to remove: from a ratio, a number, a list, or a target for the pruned model."""

from collections.abc import Callable
from collections.abc import Sequence

import jax.numpy as jnp

from elder_jax import methods
from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import log
from elder_jax.model import pruning
from elder_jax.model.spec import Spec
from elder_jax.run.config import Config


def count_removed(
  config: Config, spec: Spec, num_layers: int, dtype: str, say: Callable[[str], None] = log
) -> list[int]:
  """Returns the numbers of layers to remove; the first is for the exported model.

  Args:
    dtype: of the model's weights.

  Raises:
    InputError: the model has too few layers, or a method cannot choose that many.
  """
  removal = config.removal
  given = removal.remove_layers
  if given is not None:
    check_given(given, num_layers)
  target = next((name for name in TARGETS if getattr(removal, name) is not None), None)
  if target:
    counts = [_for_target(target, getattr(removal, target), config, spec, num_layers, dtype, say)]
  else:
    counts = config.counts(num_layers)
  for n in counts:
    if n >= num_layers:
      name = 'num_remove' if removal.num_remove is not None else 'ratio'
      raise InputError(name, getattr(removal, name), f'this removes {n} layers of {num_layers}; keep at least one.')
    for method in config.methods() if n else []:
      methods.check(method, config, num_layers, n)
  return counts


def _params(spec: Spec, num_layers: int, dtype: str) -> float:
  del dtype
  return pruning.num_params(abstract_decoder(spec.with_layers(list(range(num_layers))), num_layers))


def _gigabytes(spec: Spec, num_layers: int, dtype: str) -> float:
  return _params(spec, num_layers, dtype) * jnp.dtype(dtype).itemsize / 1e9


def _read_for_a_token(spec: Spec, num_layers: int, dtype: str) -> float:
  """Number of weights that generating a token reads."""
  return _params(spec, num_layers, dtype) - unread(spec)


def unread(spec: Spec) -> int:
  """Weights of an embedding table that is not also the head: generating a token reads only one row of it."""
  return 0 if spec.tied else spec.vocab_size * spec.d_model


# Setting -> (measure of a model, condition on (dense, pruned, target), what the measure counts).
TARGETS = {
  'target_params': (_params, lambda dense, pruned, target: pruned <= target, 'parameters'),
  'target_gb': (_gigabytes, lambda dense, pruned, target: pruned <= target, 'GB of weights'),
  'target_speedup': (
    _read_for_a_token,
    lambda dense, pruned, target: dense / pruned >= target,
    'weights read per token',
  ),
}


def check_given(given: Sequence[int], num_layers: int):
  """Raises InputError if --remove_layers names a layer that the model does not have, or every layer."""
  if wrong := next((l for l in given if not 0 <= l < num_layers), None):
    raise InputError('remove_layers', given, f'the model has no layer {wrong}; give layers from 0 to {num_layers - 1}.')
  if len(given) == num_layers:
    raise InputError('remove_layers', given, 'names every layer of the model; keep at least one.')


def _for_target(name: str, target: float, config: Config, spec: Spec, num_layers: int, dtype: str, say) -> int:
  """The smallest number of layers whose removal meets the target."""
  measure, met, what = TARGETS[name]
  dtype = config.output.export_dtype or dtype
  dense = measure(spec, num_layers, dtype)
  for n in range(num_layers):
    if met(dense, pruned := measure(spec, num_layers - n, dtype), target):
      say(f'--{name}={as_text(target)}: removing {n} of {num_layers} layers ({what}: {dense:.4g} → {pruned:.4g})')
      return n
  raise InputError(
    name,
    target,
    f'even a single layer cannot meet it ({what}: {dense:.4g} → {pruned:.4g}); choose a less strict target.',
  )
