"""Sums over all tokens of the text, and the linear systems that are made of them.

The sums of the batches are added up on the devices. Of each matrix a device holds some rows only: for a model of 70B
parameters a matrix has 5 GB. The host reads the total once.

Dimension names: see model/decoder.py. S is all tokens of a batch, A the features that a matrix is fitted on.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from elder_jax.devices import hosts
from elder_jax.devices import sharding

product = functools.partial(jnp.einsum, 'SA,SD->AD', precision=jax.lax.Precision.HIGHEST)


def rows(a) -> jax.Array:
  """Reshapes [B, T, …] to float32 rows, one per token."""
  return a.reshape(a.shape[0] * a.shape[1], -1).astype(jnp.float32)


def weights(target_SD):
  """Returns 1 / ‖target‖² per token, [S, 1]. It turns a squared error into a relative one."""
  return 1 / jnp.maximum(jnp.sum(target_SD**2, -1, keepdims=True), 1e-12)


def spread(tree):
  """The sums of a batch, sharded: matrices by rows over all devices if their number divides the rows, others replicated."""
  return jax.tree.map(
    lambda a: sharding.constrain(a, *((sharding.AXES, None) if a.ndim == 2 else [None] * a.ndim)), tree
  )


def add(total, found):
  """Adds the sums of a batch to `total`, which is consumed; None: there was no batch before. See `on_host`."""
  return _begin(found) if total is None else _add(total, found)


@jax.jit
def _begin(found):
  return [(a, jnp.zeros_like(a)) for a in found]


@functools.partial(jax.jit, donate_argnums=0)
def _add(total, found):
  """Keeps what float32 rounds off each sum, by Knuth's two-sum: the total is nearly as exact as in float64."""

  def with_rest(sum_and_rest, a):
    before, rest = sum_and_rest
    after = before + a
    taken = after - before
    return after, rest + ((before - (after - taken)) + (a - taken))

  return [with_rest(t, a) for t, a in zip(total, found)]


def on_host(total) -> list[np.ndarray]:
  """Returns a total of `add` in float64. All processes must call it."""
  found = []
  for a, rest in total:
    found.append(hosts.to_host(a).astype(np.float64))
    found[-1] += hosts.to_host(rest)
  return found


def solve_once(solve: Callable[..., np.ndarray], gram: np.ndarray, cross: np.ndarray, *args) -> np.ndarray:
  """Returns solve(gram, cross, *args), which has the shape of `cross`. Process 0 computes it for all processes.

  The last bits may differ between CPUs, and all processes must use the same values.
  """
  return hosts.broadcast(solve(gram, cross, *args) if hosts.is_leader() else np.zeros_like(cross))


def ridge(gram_AA: np.ndarray, cross_AD: np.ndarray, strength: float, groups: tuple[int, ...] = ()) -> np.ndarray:
  """Returns (G + Λ)⁻¹ C. Λ is diagonal: `strength` times the mean diagonal of G within each group of features.

  Args:
    groups: The number of features in each group, in order; empty: one group.
  """
  diagonals = np.split(np.diag(gram_AA), np.cumsum(groups)[:-1])
  penalty_A = np.concatenate([np.full(d.size, strength * d.mean()) for d in diagonals])
  penalised_AA = gram_AA.copy()
  penalised_AA.flat[:: len(gram_AA) + 1] += penalty_A
  return scipy.linalg.solve(penalised_AA, cross_AD, assume_a='pos', overwrite_a=True, check_finite=False)


# ---- for the plan ----


def total_device_bytes(found, devices: int) -> int:
  """Bytes per device of a total. found: the sums of a batch, abstract."""
  return sum(
    2 * a.size * a.dtype.itemsize // (devices if a.ndim == 2 and a.shape[0] % devices == 0 else 1) for a in found
  )


def solver_host_bytes(found) -> int:
  """Bytes of a host that reads a total and solves its system: in float64, every matrix and a copy for the solver."""
  return sum(2 * 8 * math.prod(a.shape) for a in found)
