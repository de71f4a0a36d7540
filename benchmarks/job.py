"""Where does the time of a whole run go? Its stages, with tracing and compilation counted apart.

  python -m benchmarks.job [--json=FILE] [-- FLAGS OF elder_jax prune, by default --config=smollm2_135m_demo]

The run has a work folder and a program cache of its own, so that nothing of an earlier run is reused.
"""

import collections
import json
import pathlib
import tempfile
import time

from absl import app
from absl import flags
import jax

from elder_jax import commands
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.run.clock import Clock
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table

_JSON = flags.DEFINE_string('json', '', 'File for the figures.')

# jax's own events (jax/_src/dispatch.py), in seconds.
COMPILING = {
  '/jax/core/compile/jaxpr_trace_duration': 'tracing',
  '/jax/core/compile/jaxpr_to_mlir_module_duration': 'tracing',
  '/jax/core/compile/backend_compile_duration': 'compiling',
}


class Times:
  """Seconds of each stage of a run in this process."""

  def __init__(self):
    self.stages: dict[str, dict[str, float]] = {}
    self._now = self.stages.setdefault('before the first stage', collections.defaultdict(float))

  def listen(self):
    """From now on, stages that a Clock times and what jax compiles are counted."""
    time_stage = Clock.time

    def timed(clock, stage, do):
      outer, self._now = self._now, self.stages.setdefault(stage.title, collections.defaultdict(float))
      start = time.perf_counter()
      try:
        return time_stage(clock, stage, do)
      finally:
        self._now['seconds'] += time.perf_counter() - start
        self._now = outer

    def compiled(event: str, seconds: float, **_):
      if kind := COMPILING.get(event):
        self._now[kind] += seconds

    Clock.time = timed
    jax.monitoring.register_event_duration_secs_listener(compiled)


def table(stages: dict[str, dict[str, float]], total: float) -> str:
  """Markdown, longest stage first."""
  apart = total - sum(times.get('seconds', 0.0) for times in stages.values())
  rows = {name: dict(times) for name, times in stages.items()}
  rows['before the first stage']['seconds'] = apart
  cells = []
  for name, times in sorted(rows.items(), key=lambda row: -row[1]['seconds']):
    kinds = [figure(times.get(kind, 0.0), 1, limit=1e9) for kind in ('seconds', 'tracing', 'compiling')]
    cells.append([name, *kinds, figure(100 * times['seconds'] / total, 0)])
  return markdown_table(['stage', 'seconds', 'of these tracing', 'of these compiling', '% of the run'], cells)


def main(args):
  asked = args[1:] or ['--config=smollm2_135m_demo']
  times = Times()
  times.listen()
  with tempfile.TemporaryDirectory() as scratch:
    start = time.perf_counter()
    commands.run_verb('prune', [*asked, f'--workdir={scratch}/run'])
    total = time.perf_counter() - start
    report = json.loads((pathlib.Path(scratch) / 'run' / 'report.json').read_text(encoding='utf-8'))
  print(table(times.stages, total))
  print(f'\n{" ".join(asked)}: {figure(total, 0, limit=1e9)} s. Device: {device_name()}.')
  print('Versions: ' + ', '.join(f'{k} {v}' for k, v in package_versions().items()) + '.')
  if _JSON.value:
    result = {'flags': asked, 'total': total, 'stages': times.stages, 'ppl': report['ppl']}
    pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
  app.run(main)
