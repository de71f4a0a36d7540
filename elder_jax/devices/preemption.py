"""SIGTERM, Ctrl-C and JAX's preemption notice: a run saves its state and exits. Rerun it to resume."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from elder_jax.errors import CTRL_C
from elder_jax.errors import PREEMPTED


class Preempted(BaseException):
  """The run received a signal to stop. Not an Exception, so that no library handles it as an error of its own."""


_listens = False
_signalled = False
_by_ctrl_c = False
_points = 0


def listen():
  """From now on, SIGTERM stops the run at the next call of `reached`. Call it in the main thread.

  The handler raises nothing: it may run inside a destructor, which swallows exceptions, or between two renames. Under
  jax.distributed there is no handler: JAX listens, and notifies all processes of a signal that one of them received.
  """
  global _listens
  _listens = True
  if not jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, _on_sigterm)


def listen_to_ctrl_c():
  """From now on, the first Ctrl-C acts like SIGTERM and a second one aborts at once. Call it once there is work to save.

  Has no effect unless the command called `listen`: a program that uses this package handles signals itself. It also
  keeps Ctrl-C ignored if the shell set that, as for commands in the background.
  """
  if _listens and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _on_sigint)


def _on_sigterm(number, frame):
  del number, frame
  global _signalled
  _signalled = True


def _on_sigint(number, frame):
  global _by_ctrl_c
  _by_ctrl_c = True
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # Not print, which is not reentrant.
  os.write(2, b'\nelder_jax: stopping at the next step; press Ctrl-C again to abort at once\n')
  if jax.distributed.is_initialized():
    os.kill(os.getpid(), signal.SIGTERM)
  else:
    _on_sigterm(number, frame)


def exit_status() -> int:
  """The exit status after `Preempted`."""
  return CTRL_C if _by_ctrl_c else PREEMPTED  # scripts restart a run after 75 only


def by() -> str:
  """What stopped the run."""
  return 'Ctrl-C' if _by_ctrl_c else 'SIGTERM'


def reached() -> bool:
  """Whether to stop here. All processes must call this at the same points of their work; all get the same answer.

  JAX's protocol agrees on a step that no process has passed yet. Here, the step is the number of calls.
  """
  global _points
  if not jax.distributed.is_initialized():
    return _signalled
  _points += 1
  return multihost_utils.reached_preemption_sync_point(_points)


def check():
  """Raises Preempted if the run should stop. For points outside training, where there is nothing to save."""
  if reached():
    _stop()


def check_alone():
  """`check` for work of one process while the others wait. It does not see signals that other processes received."""
  if _signalled:
    _stop()


def _stop():
  raise Preempted(f'stopped by {by()}; the stages that are finished are kept; rerun the same command to resume')
