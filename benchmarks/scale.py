"""Checks pod runs with the TPU compiler, on a machine without a TPU: memory, collectives and time of both stages' steps.

  python -m benchmarks.scale [--row=NAME] [--again]

Compiles the steps of a run (elder_jax/run/plan) for TPU slices. Writes what the compiler reports to
benchmarks/scale.jsonl, one line per row, and the tables to docs/results/scale.md. Rows that exist are compiled again only
with --again. Needs pip install 'elder_jax[tpu]', and per row minutes and a few GB of memory.
"""

import collections
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax

from benchmarks import hlo
from benchmarks import maxtext
from elder_jax.devices import sharding
from elder_jax.errors import as_text
from elder_jax.hf.source import architecture
from elder_jax.model.program import Program
from elder_jax.run import plan
from elder_jax.run.config import Config
from elder_jax.run.plan.compile import GIB
from elder_jax.run.plan.compile import measure
from elder_jax.run.prepare import check_sizes
from elder_jax.run.tables import markdown_table

_ROWS = flags.DEFINE_multi_string('row', [], 'Name of a row to compile; repeatable. Unset: all missing rows.')
_AGAIN = flags.DEFINE_boolean('again', False, 'Also compile rows that exist already.')
KEPT = pathlib.Path(__file__).parent / 'scale.jsonl'
PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'results' / 'scale.md'
BEGIN, END = '<!-- benchmarks/scale.py begins -->\n', '<!-- benchmarks/scale.py ends -->\n'

LLAMA = dict(
  model_type='llama',
  rms_norm_eps=1e-5,
  hidden_act='silu',
  tie_word_embeddings=False,
  max_position_embeddings=4096,
)
MODELS = {
  'LLaMA-2-7B': LLAMA
  | dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
  ),
  'LLaMA-3-8B': LLAMA
  | dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
  ),
  'LLaMA-2-70B': LLAMA
  | dict(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
  ),
}
# Settings of all rows: both stages of the paper's method, in bfloat16, trained weights in float32.
SETTINGS = dict(method=('elder',), recipe='regularize', compare=(), seq_len=2048, dtype='bfloat16', remat='full')
SLICES = {
  'LLaMA-2-7B, v5e-16': dict(topology='v5e:4x4', mesh='1,16,1', batch_size=16),
  'LLaMA-2-7B, v4-16': dict(topology='v4:2x2x2', mesh='1,8,1', batch_size=16, grad_accum=2),
  'LLaMA-3-8B, v6e-16': dict(topology='v6e:4x4', mesh='1,16,1', batch_size=16),
  'LLaMA-2-70B, v5p-128': dict(topology='v5p:4x4x4', mesh='1,16,4', batch_size=64),
  'LLaMA-2-70B, v5e-256': dict(topology='v5e:16x16', mesh='1,32,8', batch_size=32),
}

# Row -> LIBTPU_INIT_ARGS, if it has any.
COMPILER_FLAGS = {'LLaMA-2-70B, v5p-128, stage 2, remat=dots': maxtext.FLAGS_V5P}


def rows() -> dict[str, tuple[str, dict, int]]:
  """Name -> (stage, settings, layers).

  Three more rows: where there is memory for it, a step that recomputes no products, on v5p with MaxText's flags for the
  compiler; and the 70B with a tenth of its layers, for its compile time.
  """
  found = {}
  for name, settings in SLICES.items():
    layers = MODELS[name.partition(',')[0]]['num_hidden_layers']
    found |= {f'{name}, {stage}': (stage, settings, layers) for stage in ('stage 1', 'stage 2')}
  for name, more in (('LLaMA-3-8B, v6e-16', {}), ('LLaMA-2-70B, v5p-128', {'mesh': '1,32,2'})):
    layers = MODELS[name.partition(',')[0]]['num_hidden_layers']
    found[f'{name}, stage 2, remat=dots'] = ('stage 2', SLICES[name] | {'remat': 'dots'} | more, layers)
  for name in ('LLaMA-2-70B, v5p-128',):
    found[f'{name}, stage 2, 8 layers'] = ('stage 2', SLICES[name], 8)
  return found


def compile_row(name: str) -> dict:
  stage, settings, layers = rows()[name]
  with tempfile.TemporaryDirectory() as folder:
    config = MODELS[name.partition(',')[0]] | {'num_hidden_layers': layers}
    (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config))
    mesh = tuple(map(int, settings['mesh'].split(',')))
    more = settings | dict(model=folder, plan=True, num_sequences=settings['batch_size'], mesh=mesh)
    config = Config.of(**SETTINGS | more)
    spec, num_layers = architecture(folder, json.loads((pathlib.Path(folder) / 'config.json').read_text()))
  computation = config.computation
  mesh = sharding.make_mesh(computation.mesh, plan.topology(computation.topology))
  check_sizes(config, spec, num_layers, mesh)
  _, programs = plan.planned(config, spec, num_layers, [min(8, num_layers - 7)], mesh)
  program = next(p for p in programs if p.name.startswith({'stage 1': 'stage 1', 'stage 2': 'training'}[stage]))
  wall, cpu = time.monotonic(), time.process_time()
  with jax.set_mesh(mesh):
    measured = measure(program, mesh)
  wall, cpu = time.monotonic() - wall, time.process_time() - cpu
  kind = mesh.devices.flat[0].device_kind
  row = {
    'name': name,
    'flags': ' '.join(f'--{k}={as_text(v)}' for k, v in (SETTINGS | settings).items() if v != ()),
    'compiler_flags': COMPILER_FLAGS.get(name, ''),
    'chips': mesh.size,
    'tokens': config.data.batch_size * config.data.seq_len,
    'parameters': program.params,
    'optimiser': program.opt_state,
    'gradients': program.gradients,
    'beside': program.beside,
    'peak': measured.peak,
    'limit': measured.limit,
    'model_flops': program.model_flops,
    'flops': measured.flops,
    'least_s': measured.least_seconds,
    'compile_s': wall,
    'compile_cpu_s': cpu,
  }
  if measured.compiled:
    text = measured.compiled.as_text()
    row |= {'cycles': hlo.cycles(text)} | hlo.estimate(text, kind)
    row |= of_collectives(hlo.collectives(text), program, num_layers)
  row['versions'] = {p: importlib.metadata.version(p) for p in ('jax', 'jaxlib', 'libtpu', 'flax')}
  row['python'], row['date'] = platform.python_version(), datetime.date.today().isoformat()
  return row


def of_collectives(found: list[hlo.Collective], program: Program, num_layers: int) -> dict:
  """Counts by kind, bytes received, the largest collectives, and those whose result is a whole stack of layers."""
  counts = collections.defaultdict(lambda: [0, 0, 0.0])
  for c in found:
    count = counts[c.kind]
    count[0], count[1], count[2] = count[0] + 1, count[1] + c.runs, count[2] + c.runs * c.received
  # A stack gathered over fsdp has all of its elements, or the shard that tp leaves on a device.
  state, (frozen, _), *_ = program.args
  stacks = [a for a in jax.tree.leaves((state.trained.layers, frozen.layers)) if a.ndim > 2]
  tp = stacks[0].sharding.mesh.shape['tp']
  sizes = {math.prod(a.shape) // n for a in stacks for n in (1, tp)}
  # Of all kinds: on a three-dimensional slice, the compiler gathers with an all-reduce of zeros and one part.
  found = sorted(found, key=lambda c: -c.elements)
  in_layers = [c for c in found if c.runs % num_layers == 0]
  return {
    'collectives': counts,
    'received': sum(c.runs * c.received for c in found),
    'largest': f'{found[0].kind} {found[0].shape}',
    'largest_in_layers': f'{in_layers[0].kind} {in_layers[0].shape}',
    'whole_stacks': [c.shape for c in found if c.elements in sizes],
  }


def read() -> dict[str, dict]:
  lines = KEPT.read_text().splitlines() if KEPT.exists() else []
  return {row['name']: row for row in map(json.loads, lines)}


def write(results: dict[str, dict]):
  order = [name for name in rows() if name in results]
  KEPT.write_text(''.join(json.dumps(results[name]) + '\n' for name in order))
  head, _, rest = PAGE.read_text(encoding='utf-8').partition(BEGIN)
  PAGE.write_text(head + BEGIN + tables(results) + END + rest.partition(END)[2], encoding='utf-8')


def table(cells: list[list[str]]) -> list[str]:
  return [markdown_table(cells[0], cells[1:]), '']


def tables(results: dict[str, dict]) -> str:
  def gib(n):
    return f'{n / GIB:.2f}'

  done = [results[name] for name in rows() if name in results]
  main = [r for r in done if not r['name'].endswith(' layers')]
  memory = [
    ['GiB per chip', 'parameters', 'optimiser', 'gradients', 'other models', 'activations …', 'peak', 'of', 'fits']
  ]
  for r in main:
    state = [r[k] for k in ('parameters', 'optimiser', 'gradients', 'beside')]
    rest = max(0, r['peak'] - sum(state))
    fits = 'yes' if r['peak'] <= r['limit'] else '**no**'
    memory.append([r['name'], *map(gib, state), gib(rest), gib(r['peak']), gib(r['limit']), fits])
  steps = [['step', 'tokens', 'model PFLOP', 'least s', 'compute s', 'links s', 'step s', 'MFU, %', 'CPU s to compile']]
  moves = [['collectives', *hlo.KINDS, 'GB received', 'largest', 'largest in a layer', 'whole stacks']]
  for r in [r for r in main if 'cycles' in r]:
    low, high = max(r['compute_s'], r['links_s']), r['compute_s'] + r['links_s']
    mfu = [f'{100 * r["least_s"] / s:.0f}' for s in (high, low)]
    steps.append(
      [
        r['name'],
        f'{r["tokens"]:,}',
        f'{r["model_flops"] / 1e15:.2f}',
        f'{r["least_s"]:.2f}',
        f'{r["compute_s"]:.2f}',
        f'{r["links_s"]:.2f}',
        f'{low:.2f} … {high:.2f}',
        ' … '.join(dict.fromkeys(mfu)),
        f'{r["compile_cpu_s"]:.0f}',
      ]
    )
    counts = [r['collectives'].get(kind, [0, 0]) for kind in hlo.KINDS]
    moves.append(
      [
        r['name'],
        *(f'{n} ({runs:,})' if n else '0' for n, runs, *_ in counts),
        f'{r["received"] / 1e9:.1f}',
        f'`{r["largest"]}`',
        f'`{r["largest_in_layers"]}`',
        ', '.join(r['whole_stacks']) or 'none',
      ]
    )
  lines = table(memory) + table(steps) + table(against_maxtext(results)) + table(moves)
  for r in done:
    if r['name'].endswith(' layers') and (whole := results.get(r['name'].rpartition(',')[0])):
      ratio = whole['compile_cpu_s'] / r['compile_cpu_s']
      lines += [
        f'{r["name"]} compiled in {r["compile_cpu_s"]:.0f} s of processor time ({r["compile_s"]:.0f} s by the clock), all '
        f'layers in {whole["compile_cpu_s"]:.0f} s ({whole["compile_s"]:.0f} s): {ratio:.2f} ×.',
        '',
      ]
  lines += ['Flags of each row, with `--plan --model=FOLDER` a command that prints its memory:', '']
  with_flags = {r['name']: f', with `LIBTPU_INIT_ARGS="{more}"`' for r in main if (more := r.get('compiler_flags'))}
  lines += [f'- {r["name"]}: `{r["flags"]}`{with_flags.get(r["name"], "")}' for r in main] + ['']
  made = sorted({(r['date'], r['python'], *(f'{k} {v}' for k, v in r['versions'].items())) for r in done})
  lines += ['; '.join(f'{date}, Python {python}, {", ".join(more)}' for date, python, *more in made) + '.']
  return '\n'.join(lines) + '\n'


def against_maxtext(results: dict[str, dict]) -> list[list[str]]:
  """A step of ours beside MaxText's, and MaxText's estimates beside what it publishes."""
  cells = [['step', 'tokens per chip', 'compute s', 'links s', 'tokens/s per chip', 'MFU, %', 'measured, %']]

  def add(name: str, r: dict, tokens: float, flops: float, published: float | None):
    seconds = r['compute_s'] + r['links_s'], max(r['compute_s'], r['links_s'])
    mfu = [f'{100 * flops / hlo.DEVICES[maxtext.generation(name)[0]][0] / s:.0f}' for s in seconds]
    rates = [f'{tokens / s:,.0f}' for s in seconds]
    times = f'{r["compute_s"]:.2f}', f'{r["links_s"]:.2f}'
    measured = '' if published is None else f'{published:.0f}'
    cells.append([name, f'{tokens:,.0f}', *times, ' … '.join(rates), ' … '.join(mfu), measured])

  for name in maxtext.ROWS:
    row = maxtext.read().get(name)
    for ours in [r for r in results.values() if row and re.fullmatch(f'{name}, stage 2(, remat=dots)?', r['name'])]:
      # MaxText's count of FLOPs for both: it takes half of attention's square. It trains the head too, which ours does not.
      sizes = MODELS[name.split(', ')[0]]
      per_token = row['tflops'] * 1e12 / row['tokens_per_chip'] - 2 * sizes['vocab_size'] * sizes['hidden_size']
      tokens = ours['tokens'] / ours['chips']
      add(ours['name'], ours, tokens, per_token * tokens, None)
    if row:
      add(f'MaxText: {name}', row, row['tokens_per_chip'], row['tflops'] * 1e12, row['published'])
  return cells


def main(argv):
  del argv
  jax.config.update('jax_platforms', 'cpu')  # the TPUs are only compiled for
  results = read()
  for name in _ROWS.value or rows():
    if name not in results or _AGAIN.value:
      if os.environ.get('LIBTPU_INIT_ARGS', '') != (more := COMPILER_FLAGS.get(name, '')):  # read once per process
        command = [sys.executable, '-m', 'benchmarks.scale', '--again', f'--row={name}']
        subprocess.run(command, env=os.environ | {'LIBTPU_INIT_ARGS': more}, check=True)
        continue
      print(f'compiling {name}', flush=True)
      results = read()  # another process may have written rows meanwhile
      results[name] = compile_row(name)
      write(results)
      print({k: v for k, v in results[name].items() if k in ('peak', 'limit', 'compute_s', 'compile_s')}, flush=True)
  results = read()
  write(results)
  print(tables(results))


if __name__ == '__main__':
  app.run(main)
