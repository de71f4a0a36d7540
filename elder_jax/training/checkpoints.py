"""Checkpoints of a training stage, written and read by Orbax.

In a run of several processes, all of them call the methods at the same steps. Only process 0 deletes and renames.
"""

import contextlib
import gc
import logging
import pathlib
import shutil
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from elder_jax.devices import hosts
from elder_jax.errors import reason
from elder_jax.log import log
from elder_jax.training.step import TrainState

SUMS = 'sums'


def _named(state: TrainState) -> dict:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
  """A checksum per leaf, [leaves] uint32: the sum of its bits as unsigned integers, modulo 2^32.

  It does not depend on the mesh, and it changes if one byte changes.
  """

  def bits(a):
    return jax.lax.bitcast_convert_type(a, f'uint{8 * a.dtype.itemsize}')

  return jnp.stack([jnp.sum(bits(a), dtype=jnp.uint32) for a in leaves])


@contextlib.contextmanager
def _silence():
  """Silences Orbax while it reads: after an error, its background tasks log pages about what it has raised already."""
  level, hook = logging.root.manager.disable, sys.unraisablehook
  logging.disable(logging.CRITICAL)
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    logging.disable(level)
    sys.unraisablehook = hook


class Checkpoints:
  """The last checkpoints of one stage in `folder`.

  They hold the training state only: a batch depends only on the step.
  """

  def __init__(self, folder: pathlib.Path, every: int, last: int, minutes: float = 0.0, keep: int = 2):
    """The stage is named after its folder.

    Args:
      folder: holds one folder per checkpoint, named by its step.
      every: steps between checkpoints; 0: only at step `last`.
      last: the last step.
      minutes: longest time between checkpoints; 0: no limit.
      keep: number of checkpoints that are kept.
    """
    self._folder, self._every, self._last, self._minutes, self._keep = folder.absolute(), every, last, minutes, keep
    self._writing, self._newest, self._since = None, None, time.monotonic()

  @property
  def stage(self) -> str:
    return self._folder.name

  def _steps(self) -> list[int]:
    return sorted(int(p.name) for p in self._folder.glob('*') if p.name.isdecimal())  # Orbax renames a complete one

  def due(self, step: int) -> bool:
    """Whether to write a checkpoint after this step. All processes call it once per step."""
    return step == self._last or (self._every > 0 and step % self._every == 0) or self._is_time()

  def _is_time(self) -> bool:
    if not self._minutes:
      return False
    # Clocks differ, and all processes must write the same checkpoints.
    return hosts.broadcast_json(time.monotonic() - self._since >= 60 * self._minutes)

  def save(self, state: TrainState):
    """Waits for the previous checkpoint, then starts to write the state, which may be donated once this returns.

    Orbax copies the state to the host before it returns. On CPU it keeps a reference instead, and JAX does not overwrite
    a donated array that is still referenced.
    """
    self.wait()
    if (step := int(state.step)) == self._newest:
      return
    named = _named(state)
    named[SUMS] = jax.device_put(_sums(list(named.values())), state.step.sharding)
    self._writing, self._newest, self._since = ocp.save_async(self._folder / str(step), named), step, time.monotonic()

  def wait(self):
    """Waits until the checkpoint of `save` is complete, then deletes older ones and the remains of killed runs."""
    if self._writing is None:
      return
    writing, self._writing = self._writing, None
    writing.result()
    self._remove_all_but(self._steps()[-self._keep :])

  def _remove_all_but(self, steps: list[int]):
    if hosts.is_leader() and self._folder.exists():
      for path in self._folder.iterdir():
        if path.name not in map(str, steps):
          shutil.rmtree(path)

  def latest(self, state: TrainState) -> TrainState:
    """The newest saved state that can be read, with the shapes and shardings of `state`; `state` if there is none."""
    steps = hosts.broadcast_json(self._steps())
    self._remove_all_but(steps)
    for i in reversed(range(len(steps))):
      path = self._folder / str(steps[i])
      restored, why = self._load(path, state)
      if not hosts.where(restored is None):
        self._newest, self._since = steps[i], time.monotonic()
        if 0 < steps[i] < self._last:
          log(f'Resuming training at step {steps[i]} of {self._last}.')
        return restored
      then = f'resuming from step {steps[i - 1]}' if i else f'{self.stage} starts from the beginning'
      log(f'{path}: this checkpoint cannot be read ({why or "by another process"}); {then}')
      if hosts.is_leader():
        path.rename(path.with_name(f'{path.name}.unreadable'))  # kept for inspection until the next one is complete
    return state

  def _load(self, path: pathlib.Path, state: TrainState) -> tuple[TrainState | None, str]:
    """(the state, '') or (None, why it cannot be read)."""
    with _silence():
      try:
        return self._read(path, state), ''
      except jax.errors.JaxRuntimeError:  # from the device, such as out of memory: not the checkpoint's fault
        raise
      except Exception as e:  # of any type, depending on where a file is cut or changed  # noqa: BLE001
        why = textwrap.shorten(reason(e), 200, placeholder=' …')
      gc.collect()
    return None, why

  def _read(self, path: pathlib.Path, state: TrainState) -> TrainState:
    named = _named(state)

    def shape(a):
      return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)

    sums = jax.ShapeDtypeStruct((len(named),), jnp.uint32, sharding=state.step.sharding)
    restored = ocp.load(path, {k: shape(a) for k, a in named.items()} | {SUMS: sums})
    leaves = [restored[k] for k in named]
    if not np.array_equal(_sums(leaves), restored[SUMS]):
      raise ValueError('its checksums do not match')
    return jax.tree.unflatten(jax.tree.structure(state), leaves)

  def clear(self):
    if hosts.is_leader():
      shutil.rmtree(self._folder, ignore_errors=True)
