"""The processes of a run: how they find one another, and what they need to agree on.

All of them run the same program in step. Process 0 leads: it alone logs, reports and writes JSON and the export, and where
the course of a run depends on anything outside the arrays (a file that is there, a clock), it says and the others follow.
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

LEAVES_LAST = 5.0  # seconds; with process 0 goes what connects the others, and jax aborts whoever is still there
SHARED_FOLDER_PATIENCE = 20.0  # seconds; network file systems remember for a while that a file was not there


@dataclasses.dataclass(frozen=True)
class Launch(Settings):
  """What differs between the processes of a run, and so is not of its config.json."""

  distributed: str = setting(
    'auto',
    'Several processes as one run: auto, where flags or the environment (Cloud TPU, GKE, Slurm, Open MPI) name them; on, '
    'the same, an error where they do not; off, this process alone.',
    choices=('auto', 'on', 'off'),
  )
  coordinator: str = setting(
    '', "Process 0's host:port, where the environment does not have it; the same in all processes."
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
      raise InputError('distributed', 'off', 'and --coordinator exclude each other; leave out one.')
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdecimal()):
      raise InputError('coordinator', self.coordinator, 'must be host:port, as in 10.0.0.2:1234.')
    if not 0 <= self.process_id < self.num_processes:
      raise InputError(
        'process_id', self.process_id, f'is not in 0 … {self.num_processes - 1}, the range of --num_processes.'
      )


def start(launch: Launch):
  """Joins this process to the others; must come before anything that touches a device.

  By flags (`launch`), or by what Cloud TPU VMs, GKE, Slurm and Open MPI have in the environment
  (jax.distributed.initialize).

  Raises:
    InputError: the others are not found.
  """
  if launch.distributed == 'off':
    return
  by_flags = launch.coordinator or None, launch.num_processes, launch.process_id
  try:
    jax.distributed.initialize(*by_flags)
  except ValueError as e:
    # What jax raises where it is told nothing and finds no cluster: one process, then.
    if launch.distributed == 'on' or launch.coordinator:
      raise InputError(
        'distributed',
        launch.distributed,
        f'the other processes are not found ({reason(e)}); give --coordinator, --num_processes and --process_id.',
      ) from e
  except RuntimeError as e:
    raise InputError(
      f'the processes of this run do not find one another ({reason(e)}); see that all were started, or use '
      '--distributed=off for one process.'
    ) from e


def is_leader() -> bool:
  return jax.process_index() == 0


def broadcast_json(value: Any) -> Any:
  """Process 0's value, which JSON must be able to hold, in all processes."""
  if jax.process_count() == 1:
    return value
  octets = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(octets.size)))
  mine = octets if is_leader() else np.zeros(size, np.uint8)
  return json.loads(multihost_utils.broadcast_one_to_all(mine).astype(np.uint8).tobytes())


def broadcast(array: np.ndarray) -> np.ndarray:
  """Process 0's array, bit for bit, in all processes; the others give one of its shape and type."""
  if jax.process_count() == 1:
    return array
  octets = np.ascontiguousarray(array).view(np.uint8)
  return multihost_utils.broadcast_one_to_all(octets).astype(np.uint8).view(array.dtype)


def where(true: bool) -> list[int]:
  """The numbers of the processes in which it is true, known to all of them."""
  if jax.process_count() == 1:
    return [0] if true else []
  return np.flatnonzero(multihost_utils.process_allgather(np.array(true)).reshape(-1)).tolist()


def barrier(what: str):
  """Until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def leader_first(compute: Callable[[], Any]) -> Any:
  """compute() in process 0 and, when that is done, in the others: for what writes files that all read.

  Raises:
    InputError: in all processes, where process 0's compute() did.
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
  """Raises InputError in all processes unless all see the same folder; process 0 must have made it."""
  if jax.process_count() == 1:
    return
  token = folder / broadcast_json(f'.shared-{os.getpid()}-{time.time_ns()}')
  if is_leader():
    for left in folder.glob('.shared-*'):  # by a run that was killed at this place
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
      f'is not shared, process {blind[0]} does not see what process 0 writes there; give a folder on '
      'storage that all hosts mount.',
    )


def to_host(array) -> np.ndarray:
  """A whole array on every host; all processes must call it. Devices hold a copy of it meanwhile: one tensor at a time."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    array = _gather(NamedSharding(array.sharding.mesh, PartitionSpec()))(array)
  return np.asarray(array)


@functools.lru_cache
def _gather(everywhere: NamedSharding):
  return jax.jit(lambda a: a, out_shardings=everywhere)


def leave(status: int, sentence: str):
  """Says why and ends this process; one of several does not wait for the others, which may wait for it in vain."""
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    print(f'elder_jax: {short(sentence)}', file=sys.stderr)
    sys.exit(status)
  print(f'elder_jax: process {jax.process_index()}: {sentence}', file=sys.stderr, flush=True)
  sys.stdout.flush()
  if is_leader():
    time.sleep(LEAVES_LAST)
  os._exit(status)
