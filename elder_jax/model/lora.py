"""LoRA (arXiv 2106.09685): of each of the layers' matrices W only a change of low rank, (alpha / rank)·A·B, is trained.

Each of the matrices (matrices.py) reads or writes the stream D. Dimension names: see decoder.py; r is the rank.
"""

from collections.abc import Callable
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model.matrices import layer_matrices


class Lora(nnx.Module):
  """A stacked matrix in its place in the Block: base W as it was, A [L, in, r] and B [L, r, out] in float32."""

  def __init__(self, base: nnx.Param, a: nnx.Param, b: nnx.Param, scale: float):
    self.base, self.a, self.b, self.scale = base, a, b, scale


def _sides(axes: str) -> tuple[str, str]:
  """The axes that a matrix of these axes sums over, and those that it makes: 'LDNH' -> ('D', 'NH')."""
  return ('D', axes[2:]) if axes[1] == 'D' else (axes[1:-1], axes[-1])


def check(model, rank: int):
  """Raises InputError where a matrix of the Decoder (abstract or not) has fewer rows or columns than `rank`."""
  smallest = None
  for param in layer_matrices(model.layers).values():
    axes, shape = param.get_metadata()['axes'], param.get_value().shape
    inner, _ = _sides(axes)
    rows, columns = np.prod(shape[1 : 1 + len(inner)]), np.prod(shape[1 + len(inner) :])
    smallest = min(rows, columns, smallest or rows)
  if rank > smallest:
    raise InputError(
      'lora_rank',
      rank,
      f"the smallest side of this model's matrices is {smallest}; give at most that, or 0 for training without LoRA.",
    )


def factors(layers, rank: int, seed: int) -> dict[str, dict[str, nnx.Param]]:
  """{name of a matrix: {'a', 'b'}}: a normal with variance 1 / rows, b zeros, so that training starts at the base."""
  made, matrices = {}, layer_matrices(layers)
  for key, (name, param) in zip(jax.random.split(jax.random.key(seed), len(matrices)), matrices.items()):
    inner, outer = _sides(param.get_metadata()['axes'])
    sizes = dict(zip(param.get_metadata()['axes'], param.get_value().shape), r=rank)
    a, b = f'L{inner}r', f'Lr{outer}'
    shape_a, shape_b = (tuple(sizes[x] for x in axes) for axes in (a, b))

    rows = np.prod([sizes[x] for x in inner])
    made[name] = {
      'a': nnx.Param(rows**-0.5 * jax.random.normal(key, shape_a), axes=a),
      'b': nnx.Param(jnp.zeros(shape_b), axes=b),
    }
  return made


def wrap(model, made: dict[str, dict[str, nnx.Param]], scale: float):
  """The Decoder (a copy of the tree, not of its arrays) with a Lora in the place of each matrix."""
  model = jax.tree.map(lambda a: a, model)
  for name, base in layer_matrices(model.layers).items():
    setattr(model.layers, name, Lora(base, made[name]['a'], made[name]['b'], scale))
  return model


def attach(model, rank: int, alpha: float, seed: int):
  """`wrap` with new factors, which lie on the devices by the table of sharding.py, as the model does."""
  home, places = getattr(jax.tree.leaves(model.layers)[0], 'sharding', None), None  # abstract, it lies nowhere
  make = functools.partial(factors, jax.eval_shape(lambda: model.layers), rank, seed)
  if isinstance(home, NamedSharding):
    places = sharding.for_model(jax.eval_shape(make), home.mesh)
  return wrap(model, jax.jit(make, out_shardings=places)(), alpha / rank)


def merged_dtype(dtype: str, export_dtype: str) -> str:
  """The type to merge to: what is computed and exported in one type can be rounded to it at once."""
  return dtype if dtype == export_dtype else 'float32'


def merge(model, dtype: str = 'float32', free: Callable | None = None):
  """The ordinary Decoder in which each Lora has become W + (alpha / rank)·A·B, summed in float32.

  Args:
    dtype: that the sums are rounded to.
    free: called with each stack W when it has been merged, which memory.free gives back.
  """
  model = jax.tree.map(lambda a: a, model)
  for name, lora in layer_matrices(model.layers).items():
    w = lora.base.get_value()
    call, args = _merge_step(lora, dtype)
    merged = call(*args)
    if free:
      jax.block_until_ready(merged)
      free(w)
    setattr(model.layers, name, lora.base.replace(merged))
  return model


def program(model, dtype: str):
  """(jitted function, its arguments) of `merge`'s heaviest step; arrays may be abstract."""
  largest = max(layer_matrices(model.layers).values(), key=lambda lora: lora.base.get_value().size)
  return _merge_step(largest, dtype)


def _merge_step(lora: Lora, dtype: str):
  w, axes = lora.base.get_value(), lora.base.get_metadata()['axes']
  return _jitted_merge(w.sharding), ((*_sides(axes), 'L'), lora.scale, dtype, w, lora.a.get_value(), lora.b.get_value())


@functools.lru_cache
def _jitted_merge(place):
  """_merge_stack, its result laid out as `place` says."""
  return jax.jit(_merge_stack, static_argnums=(0, 1, 2), out_shardings=place)


def _merge_stack(sides, scale: float, dtype: str, w, a, b):
  return _merged(sides, scale, w, a, b).astype(dtype)


def _merged(sides: tuple[str, str, str], scale: float, w, a, b):
  """W + scale·A·B in float32, of one matrix, or with the leading L of all."""
  inner, outer, L = sides
  change = jnp.einsum(f'{L}{inner}r,{L}r{outer}->{L}{inner}{outer}', a, b, precision=jax.lax.Precision.HIGHEST)
  return w.astype(jnp.float32) + scale * change


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, scale: float, x, w, a, b):
  """jnp.einsum(equation, x, W + scale·A·B), rounded to the type of x as the merged weight will be.

  By hand, because of what the backward pass would do otherwise: keep the merged weights of all layers (made again here,
  which costs r / (B·T) of the product), and compute the gradient of a whole W on the way to those of A and B. W is
  frozen: no gradient goes to it.

  Args:
    equation: as 'BTD,DNH->BTNH'; x begins with BT.
    w: of the type of x.
  """
  return _by_merged(equation, scale, x, w, a, b)


def _by_merged(equation, scale, x, w, a, b):
  _, inner, outer = _parts(equation)
  return jnp.einsum(equation, x, _merged((inner, outer, ''), scale, w, a, b).astype(x.dtype))


def _parts(equation: str) -> tuple[str, str, str]:
  """The axes of w, which of them are summed over, and which are made."""
  _, w_axes, y_axes = equation.replace('->', ',').split(',')
  outer = y_axes.removeprefix('BT')
  return w_axes, w_axes.removesuffix(outer), outer


def _forward(equation, scale, x, w, a, b):
  return _by_merged(equation, scale, x, w, a, b), (x, w, a, b)  # not `product`: policies of remat see into this


def _backward(equation, scale, kept, dy):
  x, w, a, b = kept
  w_axes, inner, outer = _parts(equation)
  merged = _merged((inner, outer, ''), scale, w, a, b).astype(x.dtype)
  dx = jnp.einsum(f'BT{outer},{w_axes}->BT{inner}', dy, merged)
  # dA = xᵀ(dy·Bᵀ) and dB = (x·A)ᵀdy: summed in float32, what goes into the sums in the type that is computed in.
  sums = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  dy_r = jnp.einsum(f'BT{outer},r{outer}->BTr', dy, b.astype(x.dtype))
  x_r = jnp.einsum(f'BT{inner},{inner}r->BTr', x, a.astype(x.dtype))
  da = scale * sums(f'BT{inner},BTr->{inner}r', x, dy_r)
  db = scale * sums(f'BTr,BT{outer}->r{outer}', x_r, dy)
  return dx, None, da, db


product.defvjp(_forward, _backward)
