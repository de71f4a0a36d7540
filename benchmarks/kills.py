"""Interrupts a tiny run again and again; its result must equal that of an uninterrupted run, bit for bit.

  python -m benchmarks.kills --workdir=/tmp/kills [--how=kill] [--times=50] [--seed=0]

--how, several with commas:
  kill       SIGKILL
  term       SIGTERM: exit status 75 and one sentence, unless Python is still importing or already exiting
  int        SIGINT, like Ctrl-C: exit status 130 and one sentence, with the same exceptions
  truncate   SIGKILL, then truncates a random file of the stage's newest checkpoint to a random length
  disk       fills the disk, a small tmpfs (root only): exit status 1, one sentence, no partial files; then frees it
  process    SIGKILL of one of two processes of jax.distributed; the other must exit too
  term_one   SIGTERM to one of two processes; both exit with 75

Each interruption comes at a random time within a random phase that is not over yet. A few starts are not interrupted. A
finished run is compared, and a new one started. Needs torch, for the tiny model of the tests.
"""

import collections
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import app
from absl import flags
import numpy as np

from elder_jax.errors import CTRL_C
from elder_jax.errors import PREEMPTED
from elder_jax.hf import manifest
from tests import tiny

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for model, text and runs; deleted first.', required=True)
_HOW = flags.DEFINE_list('how', ['kill'], 'Kinds of interruption: kill, term, int, truncate, disk, process, term_one.')
_TIMES = flags.DEFINE_integer('times', 50, 'Interruptions of each kind.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the times of interruption.')

# A phase starts with the first line on stderr that contains its mark. Before the first mark, Python imports and reads text.
PHASES = {
  'start': '',
  'loading': ': loading /',
  'dense evaluation': '] perplexity of dense',
  'stage 1': '] stage 1, gates: ',
  'stage 2': ': removing layers [',
  'evaluation': '] perplexity of regularize',
  'export': ': writing and checking',
}
NAMES = list(PHASES)
FILES = {
  'dense evaluation': 'dense.json',
  'stage 1': 'choose-elder-2.json',
  'evaluation': 'regularize.json',
}  # written when the phase is over
FLAGS = [
  '--method=elder',
  '--selection=iterative',
  '--recipe=regularize',
  '--compare=',
  '--order=joint',
  '--num_remove=2',
  '--gate_steps=30',
  '--train_steps=60',
  '--checkpoint_every=5',
  '--seq_len=32',
  '--num_sequences=40',
  '--batch_size=4',
  '--eval_seq_len=32',
  '--eval_tokens=8192',
  '--protect_first=1',
  '--protect_last=1',
  '--lr=1e-3',
  '--verify=jax',
]
DISK_MB = 64
PROCESSES = {'process': 2, 'term_one': 2}
SIGNALS = {'term': signal.SIGTERM, 'term_one': signal.SIGTERM, 'int': signal.SIGINT}  # SIGKILL otherwise


class Run:
  """One start of the command, in one or more processes. The stderr of process 0 shows the phase."""

  def __init__(self, root: pathlib.Path, workdir: pathlib.Path, processes: int = 1):
    command = [sys.executable, '-m', 'elder_jax.main', f'--model={root / "model"}', f'--workdir={workdir}', *FLAGS]
    command += [f'--train_data={root / "text.txt"}', f'--eval_data=text={root / "text.txt"}']
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(root / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    together = [[]]
    if processes > 1:
      with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
      all_of = [f'--coordinator=localhost:{port}', f'--num_processes={processes}']
      together = [[*all_of, f'--process_id={i}'] for i in range(processes)]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    self.lines, self.began = [], {'start': time.monotonic()}
    self.processes = [subprocess.Popen([*command, *more], env=env, **pipes) for more in together]
    self._readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(processes)]
    for reader in self._readers:
      reader.start()

  def _read(self, i: int):
    for line in self.processes[i].stderr:
      if i:  # so that a pipe never fills
        continue
      self.lines.append(line.rstrip())
      for name in NAMES[1:]:
        if PHASES[name] in line:
          self.began.setdefault(name, time.monotonic())

  def phase(self) -> str:
    return max(self.began, key=NAMES.index)

  def wait_for(self, phase: str, seconds: float) -> bool:
    """Waits until `seconds` after the start of the phase or a later one. Returns False if the run ended before."""
    while NAMES.index(self.phase()) < NAMES.index(phase):
      if self.ended():
        return False
      time.sleep(0.01)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if self.ended():
        return False
      time.sleep(0.01)
    return not self.ended()

  def ended(self) -> bool:
    return any(p.poll() is not None for p in self.processes)

  def wait(self, timeout: float = 600) -> list[int]:
    """Waits for all processes, kills them after `timeout` seconds, and returns their exit statuses."""
    end = time.monotonic() + timeout
    for process in self.processes:
      try:
        process.wait(max(0.0, end - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for reader in self._readers:
      reader.join()
    return [p.returncode for p in self.processes]


def result(workdir: pathlib.Path) -> dict:
  """Everything that a run writes, except timings."""
  report = json.loads((workdir / 'report.json').read_text())
  config = json.loads((workdir / 'config.json').read_text())
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  page = [line for line in (workdir / 'report.md').read_text().splitlines() if not line.startswith('Seconds: ')]
  manifest.check(workdir / 'export')
  return {
    'files': sorted(str(p.relative_to(workdir)) for p in workdir.rglob('*')),
    'report': {k: v for k, v in report.items() if k != 'seconds'},
    'page': page,
    'config': {k: v for k, v in config.items() if k not in ('workdir', 'coordinator', 'process_id')},
    'metrics': [{k: v for k, v in row.items() if k not in ('time', 'tokens_per_second')} for row in rows],
    'export': {p.name: p.read_bytes() for p in (workdir / 'export').iterdir()},
  }


def compare(workdir: pathlib.Path, expected: dict):
  got = result(workdir)
  if wrong := [part for part in expected if got[part] != expected[part]]:
    raise SystemExit(f'{workdir}: differs from the uninterrupted run in {", ".join(wrong)}')


def newest_checkpoint(workdir: pathlib.Path) -> pathlib.Path | None:
  """The newest checkpoint of the current stage, or None."""
  stage = 'regularize' if (workdir / 'stages' / 'choose-elder-2.json').exists() else 'gates'
  steps = [p for p in (workdir / 'checkpoints' / stage).glob('*') if p.name.isdecimal()]
  return max(steps, key=lambda p: int(p.name), default=None)


def truncate(newest: pathlib.Path, rng) -> str:
  """Truncates a random file of a checkpoint; returns its name."""
  files = sorted(p for p in newest.rglob('*') if p.is_file() and p.stat().st_size)
  path = files[rng.integers(len(files))]
  os.truncate(path, int(rng.integers(path.stat().st_size)))
  return str(path.relative_to(newest.parents[1]))


def fill(run: Run, ballast: pathlib.Path):
  """Keeps the disk full until the run ends, also when the run deletes files."""
  with ballast.open('ab', buffering=0) as file:
    while not run.ended():
      try:
        file.write(bytes(4096))
      except OSError:
        time.sleep(0.002)


def nothing_half_written(workdir: pathlib.Path):
  for path in (*workdir.glob('*.json'), *workdir.glob('stages/*.json')):
    json.loads(path.read_text())
  if (workdir / 'export').exists():
    manifest.check(workdir / 'export')


def one_sentence(run: Run, start: str, status: list[int]):
  """Checks that the last line contains `start`, and that stderr has no traceback, warning or other error."""
  told = [line for line in run.lines if any(w in line for w in ('Traceback', 'Warning', 'Error', 'Exception'))]
  if told or start not in run.lines[-1]:
    raise SystemExit(f'status {status} and on stderr:\n' + '\n'.join(run.lines))


class Trial:
  """Interrupts runs in one way."""

  def __init__(self, how: str, root: pathlib.Path, expected: dict, took: dict, rng):
    self.how, self.root, self.expected, self.took, self.rng = how, root, expected, took, rng
    self.phases, self.notes, self.slowest, self.finished = collections.Counter(), collections.Counter(), 0.0, 0
    self.place = root / how

  def all(self, times: int):
    self.place.mkdir()
    if self.how == 'disk':
      subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={DISK_MB}m', 'tmpfs', self.place], check=True)
    try:
      while sum(self.phases.values()) < times:
        self.once(self.place / 'run')
      while (workdir := self.place / 'run').exists():  # until `settle` has compared and deleted it
        self.settle(Run(self.root, workdir, PROCESSES.get(self.how, 1)), workdir)
    finally:
      if self.how == 'disk':
        subprocess.run(['umount', self.place], check=True)
    phases = ', '.join(f'{name} {self.phases[name]}' for name in NAMES)
    notes = ''.join(f'; {what} {count}' for what, count in sorted(self.notes.items()))
    print(
      f'{self.how}: {sum(self.phases.values())} times ({phases}{notes}); slowest exit {self.slowest:.1f} s; '
      f'{self.finished} runs finished, all equal to the uninterrupted one, bit for bit',
      flush=True,
    )

  def once(self, workdir: pathlib.Path):
    run = Run(self.root, workdir, PROCESSES.get(self.how, 1))
    over = [name for name, file in FILES.items() if (workdir / 'stages' / file).exists()]
    phases = [name for name in NAMES if name not in over] + ['none']
    if self.how == 'truncate':
      phases = [name for name in phases if name in ('stage 1', 'stage 2')]
    phase = phases[self.rng.integers(len(phases))]
    if phase != 'none' and run.wait_for(phase, self.rng.random() * self.took[phase]):
      phase = run.phase()
      self.phases[phase] += 1
      start = time.monotonic()
      self.strike(run, workdir)
      self.slowest = max(self.slowest, time.monotonic() - start)
      print(f'{self.how} {sum(self.phases.values())}: in {phase}: {run.lines[-1:]}', flush=True)
    self.settle(run, workdir)

  def strike(self, run: Run, workdir: pathlib.Path):
    if self.how == 'disk':
      ballast = self.place / 'ballast'
      fill(run, ballast)
      status = run.wait()
      if status == [1]:
        one_sentence(run, 'the disk is full', status)
      elif status != [0]:
        raise SystemExit(f'status {status}:\n' + '\n'.join(run.lines))
      self.notes[f'exit status {status[0]}'] += 1
      nothing_half_written(workdir)
      ballast.unlink()
      return
    while self.how == 'truncate' and not newest_checkpoint(workdir) and not run.ended():
      time.sleep(0.01)
    victim = run.processes[self.rng.integers(len(run.processes))]
    number = SIGNALS.get(self.how, signal.SIGKILL)
    victim.send_signal(number)
    status = run.wait(60)
    if self.how == 'process':
      self.notes[f'exit status {sorted(status)}'] += 1
    if number != signal.SIGKILL:
      # Python is still importing or reading text, with nothing to save, or is already exiting.
      python = run.phase() == 'start' or (workdir / 'report.json').exists()
      saved = CTRL_C if number == signal.SIGINT else PREEMPTED
      if set(status) == {saved} and not python:
        one_sentence(run, 'stopped by Ctrl-C' if number == signal.SIGINT else 'stopped by SIGTERM', status)
      elif any(status) and not ({-number, saved} & set(status) and python):
        raise SystemExit(f'status {status}:\n' + '\n'.join(run.lines))
      self.notes[f'exit status {sorted(status)}'] += 1
    if self.how == 'truncate' and (newest := newest_checkpoint(workdir)):
      cut = truncate(newest, self.rng)
      again = Run(self.root, workdir, PROCESSES.get(self.how, 1))
      again.wait_for('evaluation', 0)
      told = any('cannot be read' in line for line in again.lines)
      self.notes['truncated and reported' if told else 'truncated and ignored'] += 1
      print(f'truncated {cut}: {[line for line in again.lines if "cannot be read" in line]}', flush=True)
      self.settle(again, workdir)

  def settle(self, run: Run, workdir: pathlib.Path):
    status = run.wait()
    if (workdir / 'report.json').exists() and not any(status):
      compare(workdir, self.expected)
      self.finished += 1
      shutil.rmtree(workdir)
    elif not any(status):
      raise SystemExit(f'{workdir}: status 0, but no report')
    elif self.how == 'kill' and status != [-signal.SIGKILL]:
      raise SystemExit(f'status {status}:\n' + '\n'.join(run.lines))


def left_alone(root: pathlib.Path, processes: int) -> tuple[dict, dict[str, float]]:
  """(`result` of an uninterrupted run, seconds of each phase)."""
  results = []
  for name in ('compiled', 'alone'):  # the first run fills the compilation cache
    workdir = root / f'{name}_{processes}'
    run = Run(root, workdir, processes)
    if any(run.wait()):
      raise SystemExit('\n'.join(run.lines))
    results.append(result(workdir))
  assert results[0] == results[1]
  ends = [*list(run.began.values())[1:], time.monotonic()]
  took = {name: end - began for (name, began), end in zip(run.began.items(), ends)}
  print(
    f'uninterrupted, {processes} process(es): ' + ', '.join(f'{name} {s:.1f} s' for name, s in took.items()), flush=True
  )
  return results[1], took


def main(argv):
  del argv
  signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell makes background commands ignore it
  root = pathlib.Path(_WORKDIR.value).absolute()
  if 'disk' in _HOW.value and os.geteuid():
    raise SystemExit('--how=disk: mounting a tmpfs needs root; run as root, or leave disk out.')
  shutil.rmtree(root, ignore_errors=True)
  (root / 'model').mkdir(parents=True)
  tiny.write_tiny_llama(root / 'model')
  text = ''.join(f'{i} times {i % 7} is {i * (i % 7)}, and {i} is not {i + 1}.\n' for i in range(400))
  (root / 'text.txt').write_text(text)
  alone = functools.cache(functools.partial(left_alone, root))
  for how in _HOW.value:
    expected, took = alone(PROCESSES.get(how, 1))
    Trial(how, root, expected, took, np.random.default_rng(_SEED.value)).all(_TIMES.value)


if __name__ == '__main__':
  app.run(main)
