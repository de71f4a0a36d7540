"""The time that a run still takes: measuring and other stages have a speed each."""

import types

import pytest

from elder_jax.run import clock
from elder_jax.run.clock import Clock


class Log:
  """Remembers what was left when each stage began."""

  def __init__(self):
    self.left = []

  def begin_stage(self, place, title, seconds_left):
    self.left.append(seconds_left())

  def end_stage(self):
    pass


def test_measuring_has_a_speed_of_its_own(monkeypatch):
  now, log = [0.0], Log()
  monkeypatch.setattr(clock, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
  stages = [types.SimpleNamespace(title=str(i), measures=i % 2 == 0) for i in range(6)]
  timer = Clock(log, stages, {0: 1e9, 1: 100e9, 2: 1e9, 3: 200e9, 4: 2e9})
  seconds = [600, 100, 600, 200, 1200, 1]  # measuring takes far longer than its FLOPs suggest

  def take(i):
    now[0] += seconds[i]
    return {}

  for i, stage in enumerate(stages):
    timer.time(stage, lambda i=i: take(i))
  assert log.left[:2] == [None, None]  # nothing but measuring is timed
  assert log.left[2:] == pytest.approx([200 + 1200, 1200, 0, 0])
