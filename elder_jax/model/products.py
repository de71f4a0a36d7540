"""Matrix products on a CPU, with gradients written out so that XLA's fast kernels compute all of them.

XLA's kernels for a CPU take operands of one type and give float32; those of bfloat16 use the processor's instructions
for it. A product with a bfloat16 result, or of a float32 gradient with bfloat16 weights, is converted to float32 first,
and the gradients that JAX derives have transposed results, which a slower kernel computes. On other devices this is
jnp.einsum.
"""

import functools

import jax
import jax.numpy as jnp

from elder_jax.devices import sharding


def einsum(equation: str, x, w, dtype=None):
  """jnp.einsum of two arrays of one dtype, with sums in float32.

  Args:
    equation: each letter stands in two of the three terms, or in all three.
    dtype: of the result; None: that of x.
  """
  dtype = jnp.dtype(dtype or x.dtype)
  return _with_gradients(equation, dtype, x, w) if _on_cpu() else forward_only(equation, x, w, dtype)


def forward_only(equation: str, x, w, dtype=None):
  """`einsum` for use in a custom gradient: its own gradients are slow, and remat policies see its product."""
  dtype = jnp.dtype(dtype or x.dtype)
  sums = jnp.float32 if _on_cpu() else dtype
  return jnp.einsum(equation, x, w, preferred_element_type=sums).astype(dtype)


def _on_cpu() -> bool:
  return sharding.platform() == 'cpu'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradients(equation, dtype, x, w):
  return forward_only(equation, x, w, dtype)


def _forward(equation, dtype, x, w):
  kept = x.value if w.perturbed else None, w.value if x.perturbed else None  # a frozen matrix needs no x
  return forward_only(equation, x.value, w.value, dtype), kept


def _backward(equation, _, kept, dy):
  x, w = kept
  x_axes, w_axes, y_axes = equation.replace('->', ',').split(',')
  dy = dy.astype((w if x is None else x).dtype)
  dx = None if w is None else forward_only(f'{y_axes},{w_axes}->{x_axes}', dy, w)
  return dx, None if x is None else forward_only(f'{x_axes},{y_axes}->{w_axes}', x, dy)


_with_gradients.defvjp(_forward, _backward, symbolic_zeros=True)
