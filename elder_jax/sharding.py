"""The device mesh, and the one table from a parameter's axes to it."""

import math

from flax import nnx
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from elder_jax.errors import InputError

AXES = ('data', 'fsdp', 'tp')
# Axis letter of a parameter (model.py) -> mesh axis. Letters that are not here are replicated.
RULES = {'D': 'fsdp', 'N': 'tp', 'K': 'tp', 'F': 'tp', 'V': 'tp'}
BATCH = P(('data', 'fsdp'))


def make_mesh(flag: str, devices=None) -> Mesh:
  """The mesh of --mesh=data,fsdp,tp; one size may be -1, the devices that remain."""
  devices = jax.devices() if devices is None else devices
  try:
    sizes = [int(part) for part in flag.split(',')]
  except ValueError:
    sizes = []
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise InputError(f'--mesh={flag}: must be three sizes data,fsdp,tp, as in 1,8,1; one of them may be -1.')
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes) or 1
  if math.prod(sizes) != len(devices):
    raise InputError(
      f'--mesh={flag}: makes {math.prod(sizes)} devices, there are {len(devices)}; let the sizes multiply to that.'
    )
  return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def for_model(model, mesh: Mesh, flag: str):
  """A model of shardings: each parameter's NamedSharding in its place. A size that does not divide is refused."""

  def place(param: nnx.Param):
    shape, spec = param.get_value().shape, []
    for letter, size in zip(param.get_metadata()['axes'], shape):
      axis = RULES.get(letter)
      if axis and size % mesh.shape[axis]:
        raise InputError(
          f'--mesh={flag}: {axis}={mesh.shape[axis]} does not divide a size of {size} of the model (axis {letter}); '
          f'choose a divisor of {size}.'
        )
      spec.append(axis if axis not in spec else None)
    return param.replace(NamedSharding(mesh, P(*spec)))

  return jax.tree.map(place, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def check_batch(mesh: Mesh, flag: str, size: int, what: str):
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if size % ways:
    raise InputError(f'--mesh={flag}: data × fsdp = {ways} does not divide {what}={size}; choose a multiple of {ways}.')


def put_batch(batch_BT: np.ndarray, mesh: Mesh):
  """A host batch onto the mesh, each process giving the rows that its devices hold."""
  return jax.make_array_from_callback(batch_BT.shape, NamedSharding(mesh, BATCH), lambda index: batch_BT[index])
