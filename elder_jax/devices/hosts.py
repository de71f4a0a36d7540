"""The processes of a run: how they connect, and how they agree.

All processes run the same program in step. Only process 0, the leader, logs, reports and writes JSON and the export.
Where a run depends on something outside its arrays (a file, a clock), the leader decides and broadcasts the result.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.errors import reason
from elder_jax.errors import short
from elder_jax.settings import Settings
from elder_jax.settings import setting

LEAVES_LAST = 5.0  # seconds; process 0 runs the coordination service, and JAX aborts processes that outlive it
PART = 2**28  # bytes of an array that to_host gathers on every device at a time
SHARED_FOLDER_PATIENCE = 20.0  # seconds; network file systems cache for a while that a file does not exist


@dataclasses.dataclass(frozen=True)
class Launch(Settings):
  """Settings that differ between the processes of a run, so config.json does not contain them."""

  distributed: str = setting(
    'auto',
    'Run as one of several processes. auto: if flags or the environment (Cloud TPU, GKE, Slurm, Open MPI) name them. on: '
    'the same, but an error if they do not. off: this process only.',
    choices=('auto', 'on', 'off'),
  )
  coordinator: str = setting(
    '', "Process 0's host:port, if the environment does not name it; the same in all processes."
  )
  num_processes: int | None = setting(None, 'Number of processes; with --coordinator.', least=1)
  process_id: int | None = setting(None, 'Number of this process, from 0; with --coordinator.')

  def __post_init__(self):
    super().__post_init__()
    given = [bool(self.coordinator), self.num_processes is not None, self.process_id is not None]
    if any(given) and not all(given):
      raise InputError('--coordinator, --num_processes and --process_id: give all three or none.')
    if not any(given):
      return
    if self.distributed == 'off':
      raise InputError('distributed', 'off', 'and --coordinator exclude each other; leave one out.')
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdecimal()):
      raise InputError('coordinator', self.coordinator, 'must be host:port, as in 10.0.0.2:1234.')
    if not 0 <= self.process_id < self.num_processes:
      raise InputError(
        'process_id', self.process_id, f'is not in 0 … {self.num_processes - 1}, the range of --num_processes.'
      )


def start(launch: Launch):
  """Connects this process to the others. Call it before anything that uses a device.

  Uses the flags (`launch`), or the environment of Cloud TPU VMs, GKE, Slurm or Open MPI (jax.distributed.initialize).

  Raises:
    InputError: the other processes are not found.
  """
  if launch.distributed == 'off':
    return
  by_flags = launch.coordinator or None, launch.num_processes, launch.process_id
  try:
    jax.distributed.initialize(*by_flags)
  except ValueError as e:
    # JAX raises this without flags and without a cluster: a run of one process.
    if launch.distributed == 'on' or launch.coordinator:
      raise InputError(
        'distributed',
        launch.distributed,
        f'the other processes are not found ({reason(e)}); give --coordinator, --num_processes and --process_id.',
      ) from e
  except RuntimeError as e:
    raise InputError(
      f'the processes of this run do not find one another ({reason(e)}); check that all were started, or use '
      '--distributed=off for one process.'
    ) from e


def is_leader() -> bool:
  return jax.process_index() == 0


def broadcast_json(value: Any) -> Any:
  """Returns process 0's value in all processes. The value must be JSON-serialisable."""
  if jax.process_count() == 1:
    return value
  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(content.size)))
  mine = content if is_leader() else np.zeros(size, np.uint8)
  return json.loads(multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes())


def broadcast(array: np.ndarray) -> np.ndarray:
  """Returns process 0's array, bit for bit, in all processes; the others pass one of the same shape and dtype."""
  if jax.process_count() == 1:
    return array
  content = np.ascontiguousarray(array).view(np.uint8)
  return multihost_utils.broadcast_one_to_all(content).astype(np.uint8).view(array.dtype)


def where(true: bool) -> list[int]:
  """The indices of the processes that pass True; the same list in all processes."""
  if jax.process_count() == 1:
    return [0] if true else []
  return np.flatnonzero(multihost_utils.process_allgather(np.array(true)).reshape(-1)).tolist()


def barrier(what: str):
  """Waits until all processes reach this barrier. what: its name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def leader_first(compute: Callable[[], Any]) -> Any:
  """Runs compute() in process 0, then in the others. For work that writes files which all processes read.

  Raises:
    InputError: in all processes, if compute() raised it in process 0.
  """
  if jax.process_count() == 1:
    return compute()
  result, error = None, None
  if is_leader():
    try:
      result = compute()
    except InputError as e:
      error = [e.setting, as_text(e.value), e.why] if e.setting else [e.why]
  if error := broadcast_json(error):
    raise InputError(*error)
  return result if is_leader() else compute()


def check_shared(folder: pathlib.Path, flag: str):
  """Raises InputError in all processes unless all see the same folder, which process 0 must have created."""
  if jax.process_count() == 1:
    return
  token = folder / broadcast_json(f'.shared-{os.getpid()}-{time.time_ns()}')
  if is_leader():
    for left in folder.glob('.shared-*'):  # left by a run that was killed during this check
      left.unlink()
    token.touch()
  barrier('shared folder')
  end = time.monotonic() + SHARED_FOLDER_PATIENCE
  while not (seen := token.exists()) and time.monotonic() < end:
    time.sleep(0.5)
  blind = where(not seen)
  if is_leader():
    token.unlink()
  if blind:
    raise InputError(
      flag,
      folder,
      f'is not shared: process {blind[0]} does not see what process 0 writes there; give a folder on '
      'storage that all hosts mount.',
    )


def to_host(array) -> np.ndarray:
  """A whole array on every host. All processes must call it. Pass one tensor at a time; see PART."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return _in_parts(array)


def _in_parts(array: jax.Array) -> np.ndarray:
  """Reads an array by parts along an axis that is not sharded, since each device holds a copy of what is read."""
  place = array.sharding
  assert isinstance(place, NamedSharding)
  whole_axes = [i for i in range(array.ndim) if i >= len(place.spec) or place.spec[i] is None]
  axis = max(whole_axes, key=lambda i: array.shape[i], default=None)
  everywhere = NamedSharding(place.mesh, PartitionSpec())
  if axis is None or array.nbytes <= PART:
    return np.asarray(_gather(everywhere, axis, None)(array, 0))
  length = array.shape[axis]
  size = max(1, length * PART // array.nbytes)
  found = np.empty(array.shape, array.dtype)
  for start in [*range(0, length - size, size), length - size]:  # the last part overlaps the one before
    where = (slice(None),) * axis + (slice(start, start + size),)
    found[where] = np.asarray(_gather(everywhere, axis, size)(array, start))
  return found


@functools.lru_cache
def _gather(everywhere: NamedSharding, axis: int | None, size: int | None):
  def part(a, start):
    return a if size is None else jax.lax.dynamic_slice_in_dim(a, start, size, axis)

  return jax.jit(part, out_shardings=everywhere)


def leave(status: int, sentence: str):
  """Prints `sentence` to stderr and exits. In a run of several processes, it exits without waiting for the others."""
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    print(f'elder_jax: {short(sentence)}', file=sys.stderr)
    sys.exit(status)
  print(f'elder_jax: process {jax.process_index()}: {sentence}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  if is_leader():
    time.sleep(LEAVES_LAST)
  os._exit(status)
