"""LinearPatch (arXiv 2505.24680): at each cut the stream is rescaled, channel by channel, in a rotated basis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.recipes import patch
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.streams import stream_programs


def start(context: Context, choice: Choice) -> Decoder:
  """Recipe.start: x·HDHᵀ at each cut.

  H is a Hadamard matrix over √d. D_k is the mean over the sequences of
    Σ |(Y·H)_k| / Σ |(X·H)_k|,
  the sums over a sequence's tokens, X and Y the dense streams before and after the run (section 3.2, released code).
  """
  H_DD = hadamard(context.model.spec.d_model)
  sums = functools.partial(_sums, H_DD=H_DD.astype(np.float32))

  def solve(sequences: int, ratio_D) -> np.ndarray:
    return H_DD @ np.diag(ratio_D / sequences) @ H_DD.T - np.eye(len(ratio_D))

  return patch.start(context, choice, sums, solve)


@jax.jit
def _sums(x_BTD, y_BTD, H_DD):
  """The sum over sequences of each rotated channel's ratio."""

  def size_BD(a_BTD):
    rotated_BTD = jnp.einsum('BTD,DE->BTE', a_BTD.astype(jnp.float32), H_DD, precision=jax.lax.Precision.HIGHEST)
    return jnp.mean(jnp.abs(rotated_BTD), 1)

  return sharding.replicate((jnp.sum(size_BD(y_BTD) / jnp.maximum(size_BD(x_BTD), 1e-12), 0),))


def hadamard(d: int) -> np.ndarray:
  """A Hadamard matrix of order d over √d: orthogonal, with entries ± 1/√d.

  2^k ⊗ a matrix of Paley's two constructions (R. E. A. C. Paley, On orthogonal matrices, 1933) of a prime q.

  Raises:
    ValueError: these constructions have none of this order.
  """
  order, doublings = d, 0
  while (base := _paley(order)) is None:
    if order % 2:
      raise ValueError(f'no Hadamard matrix of order {d}')
    order, doublings = order // 2, doublings + 1
  return functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * doublings, base) / np.sqrt(d)


def _paley(order: int) -> np.ndarray | None:
  """Of order q + 1 for a prime q ≡ 3, or 2 (q + 1) for a prime q ≡ 1 (mod 4); None where q is not such a prime."""
  if order == 1:
    return np.ones((1, 1), int)
  q = order - 1
  if q % 4 == 3 and _is_prime(q):
    skew = _bordered(q, -1)
    return skew + np.eye(order, dtype=int)
  q = order // 2 - 1
  if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
    symmetric, one = _bordered(q, 1), np.eye(q + 1, dtype=int)
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(one, [[1, -1], [-1, -1]])
  return None


def _bordered(q: int, sign: int) -> np.ndarray:
  """The matrix of Legendre symbols (i − j / q), bordered by ones, `sign` times in the first column."""
  squares = {i * i % q for i in range(1, q)}
  symbol = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
  bordered = np.zeros((q + 1, q + 1), int)
  bordered[0, 1:], bordered[1:, 0] = 1, sign
  bordered[1:, 1:] = symbol[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
  return bordered


def _is_prime(n: int) -> bool:
  return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def why_not(spec: Spec) -> str:
  """Recipe.refuses."""
  try:
    hadamard(spec.d_model)
  except ValueError:
    return (
      f'LinearPatch rotates the stream by a Hadamard matrix, and none of order {spec.d_model} is known to us; use '
      '--recipe=ghosted or absorb.'
    )
  return ''


def programs(shapes: Shapes) -> list[Program]:
  """Recipe.programs."""
  D = shapes.spec.d_model
  return stream_programs(shapes, 'linear_patch', _sums, np.zeros((D, D), np.float32))
