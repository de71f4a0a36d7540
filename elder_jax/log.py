"""What a run tells while it works: a JSON line per step, and progress for people. Process 0 alone speaks."""

import json
import os
import pathlib
import sys
import time

import jax
import numpy as np


def say(text: str):
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


class Metrics:
  """metrics.jsonl of a run."""

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
    plain = lambda v: v.tolist() if isinstance(v, np.ndarray) else v
    row = {'stage': stage, 'step': step, **more, **{k: plain(v) for k, v in metrics.items()}}
    with self._path.open('a') as file:
      file.write(json.dumps(row) + '\n')


class Progress:
  """`what: done/of (time left) note`, on one line of a terminal, else a line every ten seconds and at the end."""

  def __init__(self, what: str):
    self._what, self._start, self._first, self._spoken = what, time.monotonic(), None, 0.0

  def __call__(self, done: int, of: int, note: str = ''):
    if jax.process_index():
      return
    now = time.monotonic()
    if self._first is None:  # the first part has the compilation in it and tells nothing of the rest
      self._first = (done, now)
    parts = done - self._first[0]
    left = f' ({(now - self._first[1]) / parts * (of - done):.0f} s left)' if parts and done < of else ''
    text = f'elder_jax: {self._what}: {done}/{of}{left} {note}'.rstrip()
    if sys.stderr.isatty():
      print(f'\r\033[K{text}', end='\n' if done == of else '', file=sys.stderr, flush=True)
    elif done == of or now - self._spoken > 10:
      print(text, file=sys.stderr, flush=True)
      self._spoken = now
