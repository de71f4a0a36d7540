"""What a run tells while it works: a JSON line per step, and progress for people. Process 0 alone speaks."""

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


def log(text: str):
  if jax.process_index() == 0:
    print('\n'.join(f'elder_jax: {line}' for line in text.splitlines()), file=sys.stderr, flush=True)


def write_whole(path: pathlib.Path, text: str):
  """Under a temporary name, renamed when it is on the disk: whatever ends the run, the name stands for a whole file."""
  temporary = path.with_name(f'{path.name}.partial')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


class MetricsFile:
  """metrics.jsonl of a run: a row for each step of training, its metrics among these keys.

  stage, step: step counts from 0 in each stage.
  time: Unix time in seconds when the step was recorded, which is up to one step after it was done.
  tokens_per_second: between this row and the one before; null for the first row of a process, which compiles.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path

  def begin(self, stage: str, step: int):
    """A stage starts at `step`: what an earlier, killed run wrote of it from there on goes."""
    if jax.process_index() or not self._path.exists():
      return
    keep = []
    for line in self._path.read_text(encoding='utf-8', errors='replace').splitlines():
      try:
        row = json.loads(line)
        if row['stage'] != stage or row['step'] < step:
          keep.append(line + '\n')
      except (ValueError, TypeError, KeyError):
        continue  # half a line, of a run that was killed while it wrote
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
  """What a method, a recipe or a training reports while it works. This one reports nothing: see RunLog."""

  def say(self, text: str):
    """A line for people."""

  def progress(self, what: str, tokens: int = 0) -> Callable[..., None]:
    """A function of (done, of, note) for people. tokens: in each of the parts that are done."""
    del what, tokens
    return lambda done, of, note='': None

  def steps(self, stage: str, tokens: int = 0) -> Callable[..., None]:
    """A function of (step, metrics, **more) that records a step of a stage. tokens: in each step."""
    del stage, tokens
    return lambda step, metrics, **more: None


QUIET = Log()


class Listener(Protocol):
  """Gets what metrics.jsonl gets, in process 0."""

  def begin(self, stage: str, step: int):
    """A stage starts at `step`, which is not 0 where a run resumes."""

  def write(self, stage: str, step: int, metrics: dict):
    """A step is done; metrics: numbers, arrays and None, by name."""


class RunLog(Log):
  """Lines on stderr, and metrics.jsonl."""

  def __init__(self, path: pathlib.Path):
    self._metrics = MetricsFile(path)
    self._listeners: list[Listener] = []
    self._stage, self._left = '', lambda: None

  def add_listener(self, listener: Listener):
    self._listeners.append(listener)

  def begin_stage(self, number: str, title: str, left: Callable[[], float | None]):
    """A stage begins, number as in 3/7; left: seconds that the stages after it take, None where that is not known."""
    self._stage, self._left = f'[{number}] ', left
    seconds = left()
    log(f'[{number}] {title}' + (f' (the stages after it: about {duration(seconds)})' if seconds else ''))

  def end_stage(self):
    self._stage, self._left = '', lambda: None

  def say(self, text: str):
    log(text)

  def progress(self, what: str, tokens: int = 0) -> 'Progress':
    return Progress(f'{self._stage}{what}', tokens, self._left)

  def steps(self, stage: str, tokens: int = 0) -> Callable[..., None]:
    before: float | None = None  # seconds on the monotonic clock when the step before was recorded

    def record(step: int, metrics: dict, **more):
      nonlocal before
      if jax.process_index():
        return
      if before is None:
        self._metrics.begin(stage, step)
        for listener in self._listeners:
          listener.begin(stage, step)
      now = time.monotonic()
      # The first step of a process compiles, so its duration is not the training's speed.
      speed = round(tokens / (now - before), 1) if before is not None and tokens and now > before else None
      before = now
      self._metrics.write(stage, step, metrics, time=round(time.time(), 3), tokens_per_second=speed, **more)
      for listener in self._listeners:
        listener.write(stage, step, metrics | {'tokens_per_second': speed} | more)

    return record


class Progress:
  """`what: done/of (time left) note`, on one line of a terminal, else a line every ten seconds and at the end."""

  def __init__(self, what: str, tokens: int = 0, later: Callable[[], float | None] = lambda: None):
    """tokens: in each part; later: seconds that the run goes on after this."""
    self._what, self._tokens, self._later, self._first, self._spoken = what, tokens, later, None, 0.0

  def __call__(self, done: int, of: int, note: str = ''):
    if jax.process_index():
      return
    now = time.monotonic()
    if self._first is None:  # the first part has the compilation in it and tells nothing of the rest
      self._first = (done, now)
    text = f'elder_jax: {self._what}: {done}/{of}{self._pace(done, of, now)} {note}'.rstrip()
    if sys.stderr.isatty():
      print(f'\r\033[K{text}', end='\n' if done == of else '', file=sys.stderr, flush=True)
    elif done == of or now - self._spoken > 10:
      print(text, file=sys.stderr, flush=True)
      self._spoken = now

  def _pace(self, done: int, of: int, now: float) -> str:
    """Tokens a second, time left of this and of the run."""
    parts, seconds = done - self._first[0], now - self._first[1]
    if not parts or seconds <= 0:
      return ''
    told = [f'{parts * self._tokens / seconds:,.0f} tokens/s'] if self._tokens else []
    if done < of:
      left, later = seconds / parts * (of - done), self._later()
      told.append(f'{duration(left)} left' + (f', {duration(left + later)} of the run' if later else ''))
    return f' ({", ".join(told)})' if told else ''


def in_megabytes(progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
  """A function of (octets done, octets in all) that tells whole megabytes, each once."""
  last = 0

  def told(done: int, of: int):
    nonlocal last
    now = -(-done // 10**6)
    if now > last:
      last = now
      progress(now, -(-of // 10**6))

  return told


def duration(seconds: float) -> str:
  """As people say it: 41 s, 12 min, 3.5 h."""
  if seconds < 100:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 6000 else f'{seconds / 3600:.1f} h'


def write_json(path: pathlib.Path, value: dict):
  """Writes what JSON can hold: NaN and infinities become null, which the tables show as "—"."""
  write_whole(path, json.dumps(_finite_or_none(value), indent=2, allow_nan=False) + '\n')


def _finite_or_none(value):
  if isinstance(value, dict):
    return {key: _finite_or_none(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite_or_none(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
