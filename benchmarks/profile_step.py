"""Where does the time of a step go? Seconds of each kind of operation in the compiled program, by XLA's own profile.

  python -m benchmarks.profile_step --model=FOLDER|FILE.gguf [--cases=forward,full] [--dtype=bfloat16]

Takes the flags of benchmarks.steps. The time of an operation does not include that of operations inside it. Operations
run at the same time where they can, so their seconds add up to more than those of the step.
"""

import collections
import glob
import pathlib
import re
import tempfile
import time

from absl import app
from absl import flags
import jax
import numpy as np

from benchmarks import steps
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.hf.source import open_source
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table

_CALLS = 3  # that are profiled, after the one that compiles
# Kind -> pattern of an operation's name in the compiled program.
KINDS = {
  'matrix products': r'ynn|xnn|dot|gemm',
  'copies and transposes': r'copy|transpose|bitcast',
  'slices of stacked weights and results': r'dynamic|slice|concatenate|pad',
  'reductions': r'reduce',
  'other elementwise operations': r'fusion|add|multiply|convert|exponential|select|broadcast|divide|compare|iota',
}


def kind_of(name: str) -> str:
  return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), 'everything else')


def own_seconds(line) -> dict[str, float]:
  """{operation: seconds without the operations inside it} of a thread."""
  found: dict[str, float] = collections.defaultdict(float)
  open_events: list[tuple[float, str]] = []  # (end, name), innermost last
  for event in sorted(line.events, key=lambda e: (e.start_ns, -e.duration_ns)):
    if not any(name == 'hlo_op' for name, _ in event.stats):
      continue
    while open_events and open_events[-1][0] <= event.start_ns:
      open_events.pop()
    if open_events:
      found[open_events[-1][1]] -= event.duration_ns / 1e9
    found[event.name] += event.duration_ns / 1e9
    open_events.append((event.start_ns + event.duration_ns, event.name))
  return found


def profile(ours: steps.Jax, case: str) -> tuple[dict[str, float], float]:
  """({operation: seconds}, seconds by the clock) of a call."""
  ours.start(case)
  ours.call(case)
  ours.call(case)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      start = time.perf_counter()
      for _ in range(_CALLS):
        ours.call(case)
      seconds = (time.perf_counter() - start) / _CALLS
    (file,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    data = jax.profiler.ProfileData.from_file(file)
  total: dict[str, float] = collections.defaultdict(float)
  for line in (line for plane in data.planes for line in plane.lines):
    for name, own in own_seconds(line).items():
      total[name] += own / _CALLS
  return total, seconds


def table(case: str, operations: dict[str, float], seconds: float) -> str:
  of_kind: dict[str, float] = collections.defaultdict(float)
  for name, own in operations.items():
    of_kind[kind_of(name)] += own
  total = sum(of_kind.values())
  rows = [
    [kind, figure(own), figure(100 * own / total, 0)] for kind, own in sorted(of_kind.items(), key=lambda k: -k[1])
  ]
  return markdown_table([f'`{case}`, {figure(seconds)} s', 'seconds of operations', '% of these'], rows)


def main(_):
  flag = flags.FLAGS
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(flag.model, pathlib.Path(scratch))
    shape = flag.batch, flag.seq_len
    tokens_BT = np.random.default_rng(0).integers(0, source.spec.vocab_size, shape, dtype=np.int32)
    ours = steps.Jax(source, tokens_BT, flag.dtype, flag.remat)
    for case in flag.cases:
      operations, seconds = profile(ours, case)
      print(table(case, operations, seconds) + '\n', flush=True)
  print(f'{flag.dtype}, {shape[0]} × {shape[1]}, remat {flag.remat}. Device: {device_name()}.')
  print('Versions: ' + ', '.join(f'{k} {v}' for k, v in package_versions().items()) + '.')


if __name__ == '__main__':
  app.run(main)
