"""The device mesh, and the table that maps a parameter's axes to mesh axes.

A run sets its mesh around all its work (`with jax.set_mesh(mesh)`). The functions under "inside the computation" read
that mesh and constrain arrays to it. They do nothing without a mesh or with one device.
"""

from collections.abc import Sequence
import functools
import math

from flax import nnx
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from elder_jax.errors import InputError

AXES = ('data', 'fsdp', 'tp')
# Axis letter of a parameter (model/decoder.py) -> mesh axis. Other letters are replicated.
RULES = {'D': 'fsdp', 'N': 'tp', 'K': 'tp', 'E': 'tp', 'F': 'tp', 'V': 'tp'}
BATCH = P(('data', 'fsdp'))


def all_devices() -> list[jax.Device]:
  """The devices that a mesh uses by default."""
  return jax.devices()


def make_mesh(sizes: Sequence[int], devices=None) -> Mesh:
  """The mesh of --mesh=data,fsdp,tp; one size may be -1, which takes the remaining devices.

  Raises:
    InputError: the sizes are invalid or do not multiply to the number of devices.
  """
  devices = all_devices() if devices is None else devices
  flag, sizes = tuple(sizes), list(sizes)
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise InputError('mesh', flag, 'must be three sizes data,fsdp,tp, as in 1,8,1; one of them may be -1.')
  if -1 in sizes:
    sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes) or 1
  if math.prod(sizes) != len(devices):
    raise InputError(
      'mesh', flag, f'needs {math.prod(sizes)} devices, there are {len(devices)}; give sizes that multiply to that.'
    )
  order = np.array(devices).reshape(sizes)
  if getattr(devices[0], 'platform', '') == 'tpu' and len({getattr(d, 'slice_index', 0) for d in devices}) == 1:
    # Follow the interconnect: neighbours on a mesh axis are neighbours in the slice.
    order = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: str) -> P:
  """The PartitionSpec of a parameter with these axes. It uses no mesh axis twice."""
  axes_of_mesh = [RULES.get(letter) for letter in axes]
  return P(*(axis if axis not in axes_of_mesh[:i] else None for i, axis in enumerate(axes_of_mesh)))


def for_model(model, mesh: Mesh, flag: Sequence[int] = ()):
  """A tree like `model` with each parameter's NamedSharding in its place.

  Raises:
    InputError: a mesh axis does not divide a size of the model. flag: the value of --mesh, for the error.
  """

  params = jax.tree.leaves(model, is_leaf=_is_param)
  cuts = [
    cut for p in params for cut in zip(p.get_metadata()['axes'], p.get_value().shape, spec(p.get_metadata()['axes']))
  ]
  for letter, size, axis in cuts:
    if axis and size % mesh.shape[axis]:
      common = math.gcd(*(n for _, n, a in cuts if a == axis))
      raise InputError(
        'mesh',
        flag,
        f'{axis}={mesh.shape[axis]} does not divide a size of {size} of the model (axis {letter}); the nearest '
        f'values that divide all sizes sharded by {axis}: {_nearest(_divisors(common), mesh.shape[axis])}.',
      )
  return jax.tree.map(
    lambda p: p.replace(NamedSharding(mesh, spec(p.get_metadata()['axes']))), model, is_leaf=_is_param
  )


def for_state(state, mesh: Mesh):
  """The NamedShardings of a training state: parameters and their optimiser state, as in `for_model`.

  Counters, and moments whose shape differs from their parameter's, are replicated.
  """

  return _map_state(lambda a, spec: NamedSharding(mesh, spec), state, mesh)


def _is_param(leaf) -> bool:
  return isinstance(leaf, nnx.Variable)


def _map_state(f, state, mesh):
  """f(array, its PartitionSpec) over a training state."""

  def of_axes(axes: str, a):
    whole = len(axes) != len(a.shape) or any(n % mesh.shape.get(axis, 1) for n, axis in zip(a.shape, spec(axes)))
    return f(a, P() if whole else spec(axes))

  def of_leaf(leaf):  # a parameter that belongs to the other part of the tree is empty
    axes = leaf.get_metadata()['axes'] if _is_param(leaf) else ''
    return jax.tree.map(lambda a: of_axes(axes, a), leaf)

  return jax.tree.map(of_leaf, state, is_leaf=_is_param)


def _divisors(size: int) -> list[int]:
  return [n for n in range(1, size + 1) if size % n == 0]


def _nearest(numbers: list[int], wanted: int) -> str:
  """The largest of the ascending `numbers` below `wanted` and the smallest above, as text."""
  below, above = [n for n in numbers if n < wanted][-1:], [n for n in numbers if n > wanted][:1]
  return ' and '.join(map(str, below + above))


def check_batch(mesh: Mesh, flag: Sequence[int], size: int, what: str):
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if size % ways:
    multiples = [n for n in (size // ways * ways, -(-size // ways) * ways) if n]
    raise InputError(
      'mesh',
      flag,
      f'data × fsdp = {ways} does not divide {what}={size}; the nearest sizes that it divides: '
      f'{_nearest(multiples, size)}.',
    )


def put_batch(batch_BT: np.ndarray, mesh: Mesh):
  """Moves a host batch to the mesh; each process supplies the rows of its devices."""
  return jax.make_array_from_callback(batch_BT.shape, NamedSharding(mesh, BATCH), lambda index: batch_BT[index])


# ---- inside the computation ----


def _mesh():
  """The mesh that is set; None if there is none or it has one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.size == 1 else mesh


def platform() -> str:
  """cpu, gpu or tpu: the platform of the mesh, which may differ from that of the host that compiles."""
  mesh = jax.sharding.get_abstract_mesh()
  found = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
  return 'gpu' if found in ('cuda', 'rocm') else found


def batch_ways() -> int:
  """Number of shards of a batch."""
  mesh = _mesh()
  return mesh.shape['data'] * mesh.shape['fsdp'] if mesh else 1


def mesh_sizes() -> dict[str, int]:
  """{axis: devices} of the mesh; empty without a mesh or with one device."""
  mesh = _mesh()
  return dict(mesh.shape) if mesh else {}


def batch_axes(size: int) -> tuple[str, ...] | None:
  """The mesh axes that shard a batch of this size; None if they do not divide it."""
  return None if size % batch_ways() else BATCH[0]


def constrain(a, *spec):
  """`a` sharded by spec, one entry per axis. An axis that the devices do not divide (one prompt, say) is replicated."""
  mesh = _mesh()
  if mesh is None:
    return a

  def ways(names):
    return math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))

  return jax.lax.with_sharding_constraint(a, P(*(e if n % ways(e) == 0 else None for n, e in zip(a.shape, spec))))


def constrain_batch(a, axis: int = 0):
  """`a` with its batch axis sharded over data and fsdp; for tokens, and for activations between layers."""
  return constrain(a, *(BATCH[0] if i == axis else None for i in range(a.ndim)))


def constrain_state(tree):
  """Parameters, gradients or a training state, sharded as in `for_state`."""
  return tree if _mesh() is None else _map_state(jax.lax.with_sharding_constraint, tree, _mesh())


def replicate(tree):
  """The tree replicated on every device; for values that hosts read, since each process needs them whole."""
  return tree if _mesh() is None else jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, P()), tree)


def gather(w, axes: str):
  """A parameter, or a layer's slice of one, gathered over fsdp and still sharded over tp, for use in a product.

  Its gradient is constrained to the parameter's own sharding at once, so that devices reduce shards (reduce-scatter),
  not whole gradients. Both shardings are pinned, else the compiler might gather the whole stack before slicing it.
  """
  if _mesh() is None:
    return w
  return _gather(w, axes[len(axes) - w.ndim :])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w, axes):
  return constrain(constrain(w, *spec(axes)), *(axis if axis == 'tp' else None for axis in spec(axes)))


_gather.defvjp(lambda w, axes: (_gather(w, axes), None), lambda axes, _, g: (constrain(g, *spec(axes)),))
