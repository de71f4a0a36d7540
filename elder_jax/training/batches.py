"""The training text as batches of tokens on the devices."""

from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np

from elder_jax.devices import preemption
from elder_jax.devices import sharding


def batch_at(rows_NT: np.ndarray, batch_size: int, step: int, seed: int | None) -> np.ndarray:
  """The [B, T] batch of a step, passes without end; `seed` None keeps the order of the rows. Pure: resume is the step."""
  per_pass = len(rows_NT) // batch_size
  epoch, i = divmod(step, per_pass)
  order_N = np.arange(len(rows_NT)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(rows_NT))
  return rows_NT[order_N[i * batch_size : (i + 1) * batch_size]]


class Batches(Sequence):
  """Batches [B, T] of tokens. `batches[step]` has no end; len, iteration and slices are about the first pass.

  A run that is asked to stop does so while it iterates.
  """

  def __init__(self, rows_NT: np.ndarray, batch_size: int, seed: int | None, mesh: jax.sharding.Mesh | None = None):
    """seed: of the order of the rows in each pass; None keeps the order."""
    self.rows_NT, self.batch_size, self._seed, self._mesh = rows_NT, batch_size, seed, mesh

  def __len__(self) -> int:
    return len(self.rows_NT) // self.batch_size

  def __getitem__(self, step):
    if isinstance(step, slice):
      return _Part(self, range(len(self))[step])
    batch_BT = batch_at(self.rows_NT, self.batch_size, step, self._seed)
    return jax.numpy.asarray(batch_BT) if self._mesh is None else sharding.put_batch(batch_BT, self._mesh)

  def __iter__(self) -> Iterator[jax.Array]:
    return iter(self[:])


class _Part(Sequence):
  """Some of the batches, made one by one."""

  def __init__(self, batches: Batches, steps: range):
    self._batches, self._steps = batches, steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, i):
    return _Part(self._batches, self._steps[i]) if isinstance(i, slice) else self._batches[self._steps[i]]

  def __iter__(self) -> Iterator[jax.Array]:
    for step in self._steps:
      preemption.check()
      yield self._batches[step]
