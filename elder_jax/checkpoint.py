"""Checkpoints of a training stage: Orbax behind save and latest."""

import pathlib
import shutil

import jax
from orbax.checkpoint import v1 as ocp

from elder_jax.train import TrainState


def _named(state: TrainState) -> dict:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


class Checkpoints:
  """The last checkpoint of one stage in `folder`. A batch is a function of the step, so that the state is all of it."""

  def __init__(self, folder: pathlib.Path, every: int, last: int):
    """every: steps between checkpoints, 0 for none but the one at step `last`."""
    self._folder, self._every, self._last = folder.absolute(), every, last

  def _steps(self) -> list[int]:
    return sorted(int(p.name) for p in self._folder.glob('*') if p.name.isdecimal())  # Orbax renames when whole

  def due(self, step: int) -> bool:
    return step == self._last or (self._every > 0 and step % self._every == 0)

  def save(self, state: TrainState):
    step = int(state.step)
    old = self._steps()
    if step not in old:
      ocp.save(self._folder / str(step), _named(state))
    for o in old:
      if o != step:
        shutil.rmtree(self._folder / str(o))

  def latest(self, state: TrainState) -> TrainState:
    """The newest saved state, shaped and sharded as `state`; `state` itself where there is none."""
    steps = self._steps()
    if not steps:
      return state
    named = _named(state)
    abstract = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for k, a in named.items()}
    restored = ocp.load(self._folder / str(steps[-1]), abstract)
    return jax.tree.unflatten(jax.tree.structure(state), [restored[k] for k in named])

  def clear(self):
    shutil.rmtree(self._folder, ignore_errors=True)
