"""How far a run is: stage i of n, and the time that is left, by the FLOPs of the stages that follow."""

from collections.abc import Callable
import time

from elder_jax.log import RunLog
from elder_jax.run.stages import Stage


class Clock:
  """Times the stages and tells the log where the run is."""

  def __init__(self, log: RunLog, stages: list[Stage], flops: dict[int, float]):
    """flops: of the model, by a stage's number; a stage that is not in it counts as nothing."""
    self._log, self._stages, self._flops = log, stages, flops
    self._seconds, self._done = 0.0, 0.0  # of stages that were timed, and their FLOPs

  def time(self, stage: Stage, do: Callable[[], dict]) -> dict:
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
    """None where nothing was timed yet."""
    return flops / self._done * self._seconds if self._done else None
