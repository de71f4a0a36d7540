"""SIGTERM and JAX's preemption notice: a run saves what it has and ends; started again, it goes on."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command will do later what it could not do now


class Preempted(BaseException):
  """The run was told to stop. Not an Exception: no library shall take it for a failure of its own."""


_signalled = False
_points = 0


def listen():
  """From now on SIGTERM ends the run where `reached` is asked. To be called in the main thread.

  The handler raises nothing: it may run inside a destructor, where that is lost, or between the renaming of two files.
  Under jax.distributed there is none: JAX listens, and tells all processes of a signal that one of them was sent.
  """
  if not jax.distributed.is_initialized():
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number, frame):
  del number, frame
  global _signalled
  _signalled = True


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
    raise Preempted('stopped by SIGTERM; the stages that were finished are kept; start the same command again to go on')
