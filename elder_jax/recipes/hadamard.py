"""Hadamard matrices for the widths of models."""

import functools

import numpy as np


def hadamard(d: int) -> np.ndarray:
  """Returns a Hadamard matrix of order d, divided by √d: orthogonal, with entries ± 1/√d.

  Built as the Kronecker product of k matrices of order 2 (Sylvester) and one of Paley's two constructions for a prime q
  (R. E. A. C. Paley, On orthogonal matrices, 1933).

  Raises:
    ValueError: these constructions give no matrix of this order.
  """
  order, doublings = d, 0
  while (base := _paley(order)) is None:
    if order % 2:
      raise ValueError(f'no Hadamard matrix of order {d}')
    order, doublings = order // 2, doublings + 1
  return functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * doublings, base) / np.sqrt(d)


def _paley(order: int) -> np.ndarray | None:
  """Paley's constructions: order q + 1 for a prime q ≡ 3, 2 (q + 1) for a prime q ≡ 1 (mod 4). None: no such q."""
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
  """The matrix of Legendre symbols (i − j / q) with a first row of ones and a first column of `sign`."""
  squares = {i * i % q for i in range(1, q)}
  symbol = np.array([0, *(1 if i in squares else -1 for i in range(1, q))])
  bordered = np.zeros((q + 1, q + 1), int)
  bordered[0, 1:], bordered[1:, 0] = 1, sign
  bordered[1:, 1:] = symbol[(np.arange(q)[:, None] - np.arange(q)[None]) % q]
  return bordered


def _is_prime(n: int) -> bool:
  return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
