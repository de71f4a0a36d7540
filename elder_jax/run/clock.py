"""The progress of a run: stage i of n, and the time left, estimated from the FLOPs of the remaining stages."""

from collections.abc import Callable
import time

from elder_jax.log import RunLog
from elder_jax.run.stages import Stage


class Clock:
  """Times the stages and reports the current one to the log.

  Measuring has a speed of its own: how many questions the tasks have is not in the plan, so its FLOPs are too few.
  """

  def __init__(self, log: RunLog, stages: list[Stage], flops: dict[int, float]):
    """flops: {index of a stage: FLOPs of the model}. A stage that is missing counts as 0."""
    self._log, self._stages, self._flops = log, stages, flops
    self._timed: dict[bool, tuple[float, float]] = {}  # whether stages measure -> (their seconds, their FLOPs)

  def time(self, stage: Stage, do: Callable[[], dict]) -> dict:
    """Calls do() and returns its result."""
    number = self._stages.index(stage)
    self._log.begin_stage(f'{number + 1}/{len(self._stages)}', stage.title, lambda: self._seconds_after(number))
    start = time.monotonic()
    try:
      return do()
    finally:
      self._log.end_stage()
      if own := self._flops.get(number):
        seconds, flops = self._timed.get(stage.measures, (0.0, 0.0))
        self._timed[stage.measures] = seconds + time.monotonic() - start, flops + own

  def _seconds_after(self, number: int) -> float | None:
    """Estimated seconds of the stages after this one; None before a stage of each of their kinds has been timed."""
    total = 0.0
    for i, flops in self._flops.items():
      if i > number and flops:
        if (kind := self._stages[i].measures) not in self._timed:
          return None
        seconds, done = self._timed[kind]
        total += flops / done * seconds
    return total
