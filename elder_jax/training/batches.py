"""The training text as batches of tokens on the devices."""

from collections.abc import Iterator
from collections.abc import Sequence

import jax
import numpy as np

from elder_jax.devices import preemption
from elder_jax.devices import sharding

SHUFFLED = 4096  # rows per shuffled block; a whole block is tokenised before the first step


def rows_at(num_rows: int, batch_size: int, step: int, seed: int | None) -> np.ndarray:
  """Indices [B] of the rows of a step; after the last row the next pass starts. seed: None keeps their order.

  Depends only on its arguments, so the step is all that a run needs to resume.
  """
  a_pass, i = divmod(step, num_rows // batch_size)
  numbers = np.arange(i * batch_size, (i + 1) * batch_size)
  if seed is None:
    return numbers
  found = numbers.copy()
  for block in np.unique(numbers // SHUFFLED):
    first = block * SHUFFLED
    order = np.random.default_rng((seed, a_pass, block)).permutation(min(SHUFFLED, num_rows - first))
    inside = numbers // SHUFFLED == block
    found[inside] = first + order[numbers[inside] - first]
  return found


class Batches(Sequence):
  """Batches [B, T] of tokens, int32. `batches[step]` is endless; len, iteration and slices cover the first pass.

  Iteration raises preemption.Preempted after a signal to stop.
  """

  def __init__(self, rows, batch_size: int, seed: int | None, mesh: jax.sharding.Mesh | None = None):
    """Batches over rows of tokens.

    Args:
      rows: has a length, and rows[numbers] is [n, T] (text.blend.Rows, or an array). If its `masked` is true,
        rows.counted(numbers) is a mask [n, T] of the tokens that count in the loss.
      batch_size: B.
      seed: of the order of the rows in each pass; None keeps the order.
      mesh: the devices that batches are sharded over; None: the default device.
    """
    self.rows, self.batch_size, self._seed, self._mesh = rows, batch_size, seed, mesh

  def __len__(self) -> int:
    return len(self.rows) // self.batch_size

  @property
  def seq_len(self) -> int:
    """Tokens in a row."""
    return self.rows[np.arange(1)].shape[1]

  def __getitem__(self, step):
    if isinstance(step, slice):
      return _Part(self, range(len(self))[step])
    return self._put(self.rows[self._numbers(step)])

  def __iter__(self) -> Iterator[jax.Array]:
    return iter(self[:])

  def weight_BT(self, step: int) -> jax.Array | None:
    """'weight_BT' of losses.loss for a step: 0 at a position whose next token does not count. None: all count."""
    if not getattr(self.rows, 'masked', False):
      return None
    counted_BT = self.rows.counted(self._numbers(step))
    return self._put(np.pad(counted_BT[:, 1:], ((0, 0), (0, 1))).astype(np.float32))

  def _numbers(self, step: int) -> np.ndarray:
    return rows_at(len(self.rows), self.batch_size, step, self._seed)

  def _put(self, array_BT: np.ndarray) -> jax.Array:
    return jax.numpy.asarray(array_BT) if self._mesh is None else sharding.put_batch(array_BT, self._mesh)


class _Part(Sequence):
  """A slice of the batches, made one by one."""

  def __init__(self, batches: Batches, steps: range):
    self._batches, self._steps = batches, steps

  def __len__(self) -> int:
    return len(self._steps)

  def __getitem__(self, i):
    return _Part(self._batches, self._steps[i]) if isinstance(i, slice) else self._batches[self._steps[i]]

  def weight_BT(self, i: int) -> jax.Array | None:
    """See Batches.weight_BT."""
    return self._batches.weight_BT(self._steps[i])

  def __iter__(self) -> Iterator[jax.Array]:
    for step in self._steps:
      preemption.check()
      yield self._batches[step]
