"""What a run reports while it works: a JSON line per step, and progress on stderr. Only process 0 writes."""

from collections.abc import Callable
import json
import math
import os
import pathlib
import sys
import time
from typing import Protocol

import jax
import numpy as np

_CLEAR_LINE = '\r\033[K'


def log(text: str):
  """Prints lines to stderr, in process 0."""
  if jax.process_index() == 0:
    lines = '\n'.join(f'elder_jax: {line}' for line in text.splitlines())
    # On a terminal, replaces an unfinished progress line.
    print(f'{_CLEAR_LINE}{lines}' if sys.stderr.isatty() else lines, file=sys.stderr, flush=True)


def write_whole(path: pathlib.Path, text: str):
  """Writes a file atomically: the text goes to a temporary file, which is renamed once it is on the disk."""
  temporary = path.with_name(f'{path.name}.partial')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


class MetricsFile:
  """metrics.jsonl of a run: a JSON object per training step. In addition to the step's metrics it has these keys:

  stage, step: step counts from 0 in each stage.
  time: Unix time in seconds at which the step was recorded, up to one step after it finished.
  tokens_per_second: since the previous row; null in the first row of a process, whose step includes compilation.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path

  def begin(self, stage: str, step: int):
    """Starts a stage at `step`. Removes the rows that an earlier, killed run wrote for this step and later ones."""
    if jax.process_index() or not self._path.exists():
      return
    keep = []
    for line in self._path.read_text(encoding='utf-8', errors='replace').splitlines():
      try:
        row = json.loads(line)
        if row['stage'] != stage or row['step'] < step:
          keep.append(line + '\n')
      except (ValueError, TypeError, KeyError):
        continue  # an incomplete line: the run was killed while writing it
    write_whole(self._path, ''.join(keep))

  def write(self, stage: str, step: int, metrics: dict, **more):
    if jax.process_index():
      return

    def plain(v):
      return v.tolist() if isinstance(v, np.ndarray) else v

    row = {'stage': stage, 'step': step, **more, **{k: plain(v) for k, v in metrics.items()}}
    with self._path.open('a') as file:
      file.write(json.dumps(row) + '\n')


class Log:
  """What methods, recipes and training report to. This base class ignores everything; see RunLog."""

  def say(self, text: str):
    """Prints a line."""

  def progress(self, what: str, tokens: int = 0) -> Callable[..., None]:
    """Returns a function of (done, of, note) that shows progress. tokens: number of tokens in each part."""
    del what, tokens
    return lambda done, of, note='': None

  def steps(self, stage: str, tokens: int = 0) -> Callable[..., None]:
    """Returns a function of (step, metrics, **more) that records a step of a stage. tokens: number per step."""
    del stage, tokens
    return lambda step, metrics, **more: None


QUIET = Log()


class Listener(Protocol):
  """Receives, in process 0, everything that is written to metrics.jsonl."""

  def begin(self, stage: str, step: int):
    """A stage starts at `step`, which is above 0 if the run resumes."""

  def write(self, stage: str, step: int, metrics: dict):
    """A step is done. metrics: {name: number, array or None}."""


class RunLog(Log):
  """Writes lines and progress to stderr, and steps to metrics.jsonl."""

  def __init__(self, path: pathlib.Path):
    self._metrics = MetricsFile(path)
    self._listeners: list[Listener] = []
    self._stage, self._left = '', lambda: None

  def add_listener(self, listener: Listener):
    self._listeners.append(listener)

  def begin_stage(self, number: str, title: str, left: Callable[[], float | None]):
    """Starts a stage.

    Args:
      number: as in 3/7.
      left: returns the estimated seconds of all later stages, or None if unknown.
    """
    self._stage, self._left = f'[{number}] ', left
    seconds = left()
    log(f'[{number}] {title}' + (f' (later stages: about {duration(seconds)})' if seconds else ''))

  def end_stage(self):
    self._stage, self._left = '', lambda: None

  def say(self, text: str):
    log(text)

  def progress(self, what: str, tokens: int = 0) -> 'Progress':
    return Progress(f'{self._stage}{what}', tokens, self._left)

  def steps(self, stage: str, tokens: int = 0) -> Callable[..., None]:
    before: float | None = None  # monotonic time of the previous record, in seconds

    def record(step: int, metrics: dict, **more):
      nonlocal before
      if jax.process_index():
        return
      if before is None:
        self._metrics.begin(stage, step)
        for listener in self._listeners:
          listener.begin(stage, step)
      now = time.monotonic()
      # The first step of a process includes compilation, so no speed is reported for it.
      speed = round(tokens / (now - before), 1) if before is not None and tokens and now > before else None
      before = now
      self._metrics.write(stage, step, metrics, time=round(time.time(), 3), tokens_per_second=speed, **more)
      for listener in self._listeners:
        listener.write(stage, step, metrics | {'tokens_per_second': speed} | more)

    return record


class Progress:
  """A status line: `[3/7] training, absorb: 81/3000  loss 2.51  1,210 tokens/s  12 min left (run: 19 min)`.

  A terminal shows one line that is overwritten. Elsewhere a line is printed every ten seconds and at the end.
  """

  def __init__(self, what: str, tokens: int = 0, later: Callable[[], float | None] = lambda: None):
    """Shows nothing yet.

    Args:
      tokens: number of tokens in each part.
      later: returns the estimated seconds of all later stages, or None if unknown.
    """
    self._what, self._tokens, self._later, self._first, self._printed = what, tokens, later, None, 0.0

  def __call__(self, done: int, of: int, note: str = ''):
    if jax.process_index():
      return
    now = time.monotonic()
    if self._first is None:  # the first part includes compilation, so the pace is measured from its end
      self._first = (done, now)
    fields = [f'elder_jax: {self._what}: {done}/{of}', note, *self._pace(done, of, now)]
    text = '  '.join(filter(None, fields))
    if sys.stderr.isatty():
      print(f'{_CLEAR_LINE}{text}', end='\n' if done == of else '', file=sys.stderr, flush=True)
    elif done == of or now - self._printed > 10:
      print(text, file=sys.stderr, flush=True)
      self._printed = now

  def _pace(self, done: int, of: int, now: float) -> list[str]:
    """Tokens per second, and the time left of this part and of the whole run."""
    parts, seconds = done - self._first[0], now - self._first[1]
    if not parts or seconds <= 0:
      return []
    fields = [f'{parts * self._tokens / seconds:,.0f} tokens/s'] if self._tokens else []
    if done < of:
      left, later = seconds / parts * (of - done), self._later()
      fields.append(f'{duration(left)} left' + (f' (run: {duration(left + later)})' if later else ''))
    return fields


def in_megabytes(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
  """Returns a function of (bytes done, bytes in total) that reports whole megabytes, each once."""
  last = 0

  def report(done: int, of: int):
    nonlocal last
    now = -(-done // 10**6)
    if now > last:
      last = now
      progress(now, -(-of // 10**6))

  return report


def duration(seconds: float) -> str:
  """A readable duration: 41 s, 12 min, 3.5 h."""
  if seconds < 100:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'


def write_json(path: pathlib.Path, value: dict):
  """Writes a value as JSON. NaN and infinities become null, which the tables show as "—"."""
  write_whole(path, json.dumps(_finite_or_none(value), indent=2, allow_nan=False) + '\n')


def _finite_or_none(value):
  if isinstance(value, dict):
    return {key: _finite_or_none(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite_or_none(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
