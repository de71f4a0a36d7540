"""The progress of a run: stage i of n, and the time left, estimated from the FLOPs of the remaining stages."""

from collections.abc import Callable
import time

from elder_jax.log import RunLog
from elder_jax.run.stages import Stage


class Clock:
  """Times the stages and reports the current one to the log."""

  def __init__(self, log: RunLog, stages: list[Stage], flops: dict[int, float]):
    """flops: {index of a stage: FLOPs of the model}. A stage that is missing counts as 0."""
    self._log, self._stages, self._flops = log, stages, flops
    self._seconds, self._done = 0.0, 0.0  # seconds and FLOPs of the stages so far

  def time(self, stage: Stage, do: Callable[[], dict]) -> dict:
    """Calls do() and returns its result."""
    number = self._stages.index(stage)
    later = sum(flops for i, flops in self._flops.items() if i > number)
    self._log.begin_stage(f'{number + 1}/{len(self._stages)}', stage.title, lambda: self._seconds_for(later))
    start = time.monotonic()
    try:
      return do()
    finally:
      self._log.end_stage()
      if own := self._flops.get(number):
        self._seconds += time.monotonic() - start
        self._done += own

  def _seconds_for(self, flops: float) -> float | None:
    """Estimated seconds; None before any stage has been timed."""
    return flops / self._done * self._seconds if self._done else None
