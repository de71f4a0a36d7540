"""SIGTERM, Ctrl-C and JAX's preemption notice: a run saves what it has and ends; started again, it resumes."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from elder_jax.errors import CTRL_C
from elder_jax.errors import PREEMPTED


class Preempted(BaseException):
  """The run was told to stop. Not an Exception: no library shall take it for a failure of its own."""


_listens = False
_signalled = False
_by_ctrl_c = False
_points = 0


def listen():
  """From now on SIGTERM ends the run where `reached` is asked. To be called in the main thread.

  The handler raises nothing: it may run inside a destructor, where that is lost, or between the renaming of two files.
  Under jax.distributed there is none: JAX listens, and tells all processes of a signal that one of them was sent.
  """
  global _listens
  _listens = True
  if not jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, _on_sigterm)


def listen_to_ctrl_c():
  """From now on, when there is work to save, the first Ctrl-C is taken as a SIGTERM; a second one aborts at once.

  Only in a command that has called `listen`: a program that uses this package has its own way with signals. A shell that
  starts a command in the background makes it ignore Ctrl-C, and so it stays.
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
  os.write(
    2, b'\nelder_jax: stopping at the next step; press Ctrl-C again to abort at once\n'
  )  # print is not reentrant
  if jax.distributed.is_initialized():
    os.kill(os.getpid(), signal.SIGTERM)
  else:
    _on_sigterm(number, frame)


def exit_status() -> int:
  """That of a run that was `Preempted`."""
  return CTRL_C if _by_ctrl_c else PREEMPTED  # scripts that restart a run after 75 leave it at the other


def by() -> str:
  """What stopped the run."""
  return 'Ctrl-C' if _by_ctrl_c else 'SIGTERM'


def reached() -> bool:
  """Whether to stop here. All processes must ask at the same points of their work; they get the same answer.

  JAX's protocol agrees on a step to stop at that no process has passed; the number of the point is that step.
  """
  global _points
  if not jax.distributed.is_initialized():
    return _signalled
  _points += 1
  return multihost_utils.reached_preemption_sync_point(_points)


def check():
  """For points outside training, where there is nothing to save. Raises Preempted."""
  if reached():
    _stop()


def check_alone():
  """`check` for work that one process does while others wait for it; of several it hears nothing."""
  if _signalled:
    _stop()


def _stop():
  raise Preempted(f'stopped by {by()}; the stages that are finished are kept; rerun the same command to resume')
