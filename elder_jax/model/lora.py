"""LoRA (arXiv 2106.09685): trains a low-rank change (alpha / rank)·A·B of each layer matrix W, with W frozen.

Each of the matrices (matrices.py) reads or writes the residual stream D. Dimension names: see decoder.py; r is the rank.
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
from elder_jax.model import products
from elder_jax.model.matrices import layer_matrices


class Lora(nnx.Module):
  """Replaces a stacked matrix of Block: the unchanged base W, with A [L, in, r] and B [L, r, out] in float32."""

  def __init__(self, base: nnx.Param, a: nnx.Param, b: nnx.Param, scale: float):
    self.base, self.a, self.b, self.scale = base, a, b, scale


def _sides(axes: str) -> tuple[str, str]:
  """Returns the input and the output axes of a matrix: 'LDNH' -> ('D', 'NH')."""
  return ('D', axes[2:]) if axes[1] == 'D' else (axes[1:-1], axes[-1])


def check(model, rank: int):
  """Raises InputError if a matrix of the Decoder (abstract or not) has fewer rows or columns than `rank`."""
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
      f"the smallest side of this model's matrices is {smallest}; give at most that, or 0 to train without LoRA.",
    )


def factors(layers, rank: int, seed: int) -> dict[str, dict[str, nnx.Param]]:
  """Returns {name of a matrix: {'a': A, 'b': B}}. A is normal with variance 1 / rows; B is 0, so training starts at W."""
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
  """Returns the Decoder (a copy of the tree, not of its arrays) with a Lora in place of each matrix."""
  model = jax.tree.map(lambda a: a, model)
  for name, base in layer_matrices(model.layers).items():
    setattr(model.layers, name, Lora(base, made[name]['a'], made[name]['b'], scale))
  return model


def attach(model, rank: int, alpha: float, seed: int):
  """`wrap` with new factors, sharded like the model (devices/sharding.py)."""
  home, places = getattr(jax.tree.leaves(model.layers)[0], 'sharding', None), None  # an abstract model has none
  make = functools.partial(factors, jax.eval_shape(lambda: model.layers), rank, seed)
  if isinstance(home, NamedSharding):
    places = sharding.for_model(jax.eval_shape(make), home.mesh)
  return wrap(model, jax.jit(make, out_shardings=places)(), alpha / rank)


def merged_dtype(dtype: str, export_dtype: str) -> str:
  """Returns the dtype to merge to. If computation and export use the same dtype, merging can round to it directly."""
  return dtype if dtype == export_dtype else 'float32'


def merge(model, dtype: str = 'float32', free: Callable | None = None):
  """Returns the plain Decoder, with W + (alpha / rank)·A·B in place of each Lora. The sum is computed in float32.

  Args:
    dtype: Dtype of the result.
    free: Called with each stacked W once it is merged, for example memory.free.
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
  """Returns (jitted function, arguments) of the heaviest step of `merge`. Arrays may be abstract."""
  largest = max(layer_matrices(model.layers).values(), key=lambda lora: lora.base.get_value().size)
  return _merge_step(largest, dtype)


def _merge_step(lora: Lora, dtype: str):
  w, axes = lora.base.get_value(), lora.base.get_metadata()['axes']
  return _jitted_merge(w.sharding), ((*_sides(axes), 'L'), lora.scale, dtype, w, lora.a.get_value(), lora.b.get_value())


@functools.lru_cache
def _jitted_merge(place):
  """_merge_stack with its result sharded as `place`."""
  return jax.jit(_merge_stack, static_argnums=(0, 1, 2), out_shardings=place)


def _merge_stack(sides, scale: float, dtype: str, w, a, b):
  return _merged(sides, scale, w, a, b).astype(dtype)


def _merged(sides: tuple[str, str, str], scale: float, w, a, b):
  """W + scale·A·B in float32, for one matrix, or with a leading L for all layers."""
  inner, outer, L = sides
  change = jnp.einsum(f'{L}{inner}r,{L}r{outer}->{L}{inner}{outer}', a, b, precision=jax.lax.Precision.HIGHEST)
  return w.astype(jnp.float32) + scale * change


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(equation: str, scale: float, x, w, a, b):
  """Returns jnp.einsum(equation, x, W + scale·A·B). The sum is rounded to the dtype of x, like the merged weight later.

  Has a custom backward pass. The automatic one would store the merged weights of all layers (recomputed here, which costs
  r / (B·T) of the product) and compute the gradient of the whole W to get those of A and B. W is frozen and gets none.

  Args:
    equation: Like 'BTD,DNH->BTNH'; x starts with BT.
    w: W, in the dtype of x.
  """
  return _by_merged(equation, scale, x, w, a, b)


def _by_merged(equation, scale, x, w, a, b):
  _, inner, outer = _parts(equation)
  return products.forward_only(equation, x, _merged((inner, outer, ''), scale, w, a, b).astype(x.dtype))


def _parts(equation: str) -> tuple[str, str, str]:
  """Returns the axes of w, its input axes and its output axes."""
  _, w_axes, y_axes = equation.replace('->', ',').split(',')
  outer = y_axes.removeprefix('BT')
  return w_axes, w_axes.removesuffix(outer), outer


def _forward(equation, scale, x, w, a, b):
  return _by_merged(equation, scale, x, w, a, b), (x, w, a, b)  # not `product`, which remat policies cannot see into


def _backward(equation, scale, kept, dy):
  x, w, a, b = kept
  w_axes, inner, outer = _parts(equation)
  merged = _merged((inner, outer, ''), scale, w, a, b).astype(x.dtype)
  dx = products.forward_only(f'BT{outer},{w_axes}->BT{inner}', dy, merged)
  # dA = xᵀ(dy·Bᵀ) and dB = (x·A)ᵀdy, with operands in the computation dtype and sums in float32.
  sums = functools.partial(products.forward_only, dtype=jnp.float32)
  dy_r = products.forward_only(f'BT{outer},r{outer}->BTr', dy, b.astype(x.dtype))
  x_r = products.forward_only(f'BT{inner},{inner}r->BTr', x, a.astype(x.dtype))
  da = scale * sums(f'BT{inner},BTr->{inner}r', x, dy_r)
  db = scale * sums(f'BTr,BT{outer}->r{outer}', x_r, dy)
  return dx, None, da, db


product.defvjp(_forward, _backward)
