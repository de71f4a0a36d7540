"""What a run will need, told before anything is loaded: bytes on each device and time of every stage, and if that fits.

The stages are those of stages.py; what computation needs beside their arrays is reported by the compiler, which is given
abstract arrays. With --topology it compiles for TPUs that need not be there.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import checkpoint_hf
from elder_jax.model.decoder import Spec
from elder_jax.run import prepare as prepare_lib
from elder_jax.run.config import Config
from elder_jax.run.plan.flops import device_bytes
from elder_jax.run.plan.flops import traced_flops
from elder_jax.run.plan.programs import Program
from elder_jax.run.plan.programs import programs

GIB = 2**30
DOES_NOT_FIT = 3  # exit status
# Device kind -> (bfloat16 FLOP/s, bytes of memory). TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm, the memory
# what the compiler leaves to a program (of 32, 16, 95 and 32 GiB); GPUs: NVIDIA's data sheets, without sparsity, where
# the memory is asked of the device.
DEVICES = {
  'TPU v4': (275e12, 30.75 * GIB),
  'TPU v5 lite': (197e12, 15.75 * GIB),
  'TPU v5': (459e12, 95.74 * GIB),
  'TPU v5p': (459e12, 95.74 * GIB),
  'TPU v6 lite': (918e12, 31.25 * GIB),
  'NVIDIA A100-SXM4-40GB': (312e12, None),
  'NVIDIA A100-SXM4-80GB': (312e12, None),
  'NVIDIA H100 80GB HBM3': (989e12, None),
  'NVIDIA H200': (989e12, None),
}


class DoesNotFit(RuntimeError):
  """A run that its devices have too little memory for; nothing was loaded."""


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program's needs, per device."""

  program: Program
  limit: float  # bytes that a device has
  peak: int  # bytes; without the compiler the part that is known without it
  compiled: Any  # jax.stages.Compiled; None: not asked, or it did not fit
  flops: float | None  # of one call on all devices, recomputation included; None: not asked
  least_seconds: float | None  # of one call, model FLOPs at the devices' peak; None: that is not known

  @property
  def fits(self) -> bool:
    return self.peak <= self.limit

  @property
  def state(self) -> int:
    p = self.program
    return p.params + p.opt_state + p.gradients + p.beside


# ---- what the compiler says ----


def measure(program: Program, mesh: Mesh, compile_it: bool = True) -> Stage:
  """The needs of a program; the mesh must be set."""
  device = mesh.devices.flat[0]
  peak_flops, limit = DEVICES.get(device.device_kind, (None, None))
  least = program.model_flops / mesh.size / peak_flops if peak_flops else None
  known = program.params + program.opt_state + program.gradients + program.beside
  limit = memory.total() if program.host else limit or _memory(device)
  stage = Stage(program, limit, known, None, None, least)
  if not compile_it or program.call is None:
    return stage
  traced = program.call.trace(*program.args)
  stage = dataclasses.replace(stage, flops=traced_flops(traced.jaxpr.jaxpr))
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    # The compiler itself refuses what does not fit, and says how much it is.
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    used = re.search(r'(Used|temporaries) \(?([\d.]+)([KMGT])', str(e))
    peak = float(used[2]) * 1024 ** ('KMGT'.index(used[3]) + 1) if used else 0
    peak += (0 if used and used[1] == 'Used' else device_bytes(program.args)) - program.twice
    return dataclasses.replace(stage, peak=max(peak, stage.limit + 1) + program.beside)
  m = compiled.memory_analysis()
  taken = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  return dataclasses.replace(stage, peak=taken + program.beside - program.twice, compiled=compiled)


def _memory(device) -> int:
  if device.platform == 'cpu':  # simulated devices share it
    return memory.total() // jax.local_device_count()
  return device.memory_stats()['bytes_limit']


def gib(size: float) -> str:
  return f'{size / GIB:.3g}' if size < GIB else f'{size / GIB:.2f}'


def table(stages: list[Stage], mesh: Mesh) -> str:
  """What people read: GiB per device, FLOPs and least time of a step."""
  number = lambda n: '?' if n is None else f'{n:.3g}'
  rows = [
    [
      'stage',
      'parameters',
      'optimiser',
      'gradients',
      'other models',
      'activations …',
      'peak',
      'TFLOP',
      'done',
      'least s',
    ]
  ]
  for s in stages:
    p = s.program
    exact = s.compiled or p.call is None or not s.fits
    rest = gib(max(0, s.peak - s.state)) if exact else '?'
    peak = gib(s.peak) if exact else f'> {gib(s.peak)}'
    sizes = [gib(n) for n in (p.params, p.opt_state, p.gradients, p.beside)]
    done = None if s.flops is None else s.flops / 1e12
    work = [number(p.model_flops / 1e12), number(done), number(s.least_seconds)] if p.model_flops else [''] * 3
    rows.append([p.name, *sizes, rest, peak, *work])
  widths = [max(map(len, column)) for column in zip(*rows)]
  align = lambda row: '  '.join(f'{c:<{w}}' if not i else f'{c:>{w}}' for i, (c, w) in enumerate(zip(row, widths)))
  sizes = ' × '.join(f'{n} {axis}' for axis, n in mesh.shape.items())
  kind, limit = mesh.devices.flat[0].device_kind, stages[0].limit if stages else 0
  lines = [
    f'{mesh.size} × {kind} with {gib(limit)} GiB each, {sizes}; GiB per device:',
    *map(align, rows),
    'TFLOP: of the model in one step, all devices together; done: with what is computed again; least: the first at the '
    "devices' full speed.",
  ]
  if any(s.program.host for s in stages):
    lines.append(f'verification in PyTorch: in the memory of the host, {gib(memory.total())} GiB.')
  if any(s.flops is None and s.program.call for s in stages):
    lines.append(
      'What activations take is asked of the compiler by --plan; on a CPU that takes as long as a small run.'
    )
  return '\n'.join(lines)


# ---- what to change ----


def advice(
  stage: Stage, config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh, source_dtype: str
) -> list[str]:
  """Changes of flags that make a stage take less, the figures from shapes."""
  if stage.program.host:
    return ['--verify=jax: the export is read back without PyTorch']
  ways, cut = (mesh.shape[a] * mesh.shape[b] for a, b in (('data', 'fsdp'), ('fsdp', 'tp')))

  def change(**settings) -> str:
    """What parameters, optimiser state and gradients would take; nothing where that is no less, or cannot be."""
    changed = dataclasses.replace(config, **settings)
    try:
      other = sharding.make_mesh(changed.mesh, mesh.devices.flatten())
      with jax.set_mesh(other):
        again = programs(changed, spec, num_layers, num_removes, other, source_dtype)
    except InputError:
      return ''
    states = [Stage(p, 0, 0, None, None, None).state for p in again if p.name.split(', as')[0] == name.split(', as')[0]]
    state = max(states, default=0)
    flags = ' '.join(f'--{k}={v}' for k, v in settings.items())
    return f'{flags}: {gib(state)} instead of {gib(stage.state)} without activations' if state < stage.state else ''

  found, name = [], stage.program.name
  if cut < mesh.size:
    found.append(change(mesh=f'1,{mesh.size // mesh.shape["tp"]},{mesh.shape["tp"]}'))
  if config.dtype == 'float32':
    found.append(change(dtype='bfloat16'))
  if name.startswith('training'):
    found += [change(optimizer=kind) for kind in ('lion', 'adafactor') if config.moment_dtype == 'float32']
    if config.trainable == 'blocks' and not config.lora_rank:
      found.append(change(lora_rank=16))
  if name == 'choosing by taylor':
    found.append('--method=cosine_block, or ppl: no gradients are needed')
  elif name.startswith('choosing by ') or name.startswith('judging'):
    found.append('--method=cosine_block: one model and one pass')
  if config.lora_rank and config.dtype != 'float32':
    found.append(change(export_dtype=config.dtype))
  rows = config.batch_size // config.grad_accum // ways
  if stage.program.opt_state and config.remat != 'full':
    streams = num_layers * max(rows, 1) * config.seq_len * spec.d_model * jnp.dtype(config.dtype).itemsize
    found.append(f'--remat=full: of each layer only its input is kept, {gib(streams)} in all')
  if stage.program.opt_state and rows > 1 and config.batch_size % ways == 0:
    found.append(f'--grad_accum={config.batch_size // ways}: 1 sequence on a device at a time instead of {rows}')
  if name.startswith('evaluation') and config.eval_batch_size > ways:
    found.append(
      f'--eval_batch_size={ways}: 1 window on a device at a time instead of {config.eval_batch_size // ways}'
    )
  if stage.state > stage.limit:
    found.append(f'at least {math.ceil(stage.state * cut / stage.limit)} devices of this kind that share the weights')
  return [line for line in found if line]


# ---- the command, and the first lines of a run ----


def tell(
  config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh, compile_it: bool, source_dtype: str
) -> tuple[str, list[Stage]]:
  """(text for people, the stages that do not fit)."""
  with jax.set_mesh(mesh):
    found = programs(config, spec, num_layers, num_removes, mesh, source_dtype)
    stages = [measure(p, mesh, compile_it) for p in found]
  if not stages:
    return 'nothing is computed on the devices', []
  lines, too_large = [table(stages, mesh)], [stage for stage in stages if not stage.fits]
  for stage in too_large:
    where = 'host' if stage.program.host else 'device'
    lines.append(f'{stage.program.name} needs {gib(stage.peak)} GiB, the {where} has {gib(stage.limit)}. Options:')
    lines += [f'  {line}' for line in advice(stage, config, spec, num_layers, num_removes, mesh, source_dtype)]
  if not too_large:
    lines.append('All stages fit.' if compile_it else 'What is known fits.')
  return '\n'.join(lines), too_large


def check(job: prepare_lib.Run, say: Callable[[str], None]):
  """Says the plan of a run that is about to load its model. On a CPU, where the compiler would take longer than a small
  model does, only what is known without it.

  Raises:
    DoesNotFit: without --force.
  """
  compile_it, source = job.mesh.devices.flat[0].platform != 'cpu', job.source
  text, too_large = tell(
    job.config, source.spec, source.num_layers, job.num_removes, job.mesh, compile_it, source.dtype
  )
  say(text)
  if not too_large or job.config.force:
    return
  names = ', '.join(stage.program.name for stage in too_large)
  raise DoesNotFit(f'the run does not fit: {names}; change what the plan above lists, or start it anyway by --force')


def main(config: Config) -> int:
  """--plan: prints, and returns the exit status: 0, or DOES_NOT_FIT. Needs no weights: config.json is enough.

  Raises:
    InputError.
  """
  if config.topology:
    jax.config.update('jax_platforms', 'cpu')  # the TPUs are only compiled for
  config.check()
  spec, num_layers, dtype = _architecture(config)
  num_removes = prepare_lib.count_removed(config, num_layers)
  mesh = sharding.make_mesh(config.mesh, topology(config.topology) if config.topology else None)
  prepare_lib.check_sizes(config, spec, num_layers, mesh)
  text, too_large = tell(config, spec, num_layers, num_removes, mesh, compile_it=True, source_dtype=dtype)
  if hosts.leads():
    print(text)
  return DOES_NOT_FIT if too_large else 0


def topology(name: str) -> list:
  """The devices of a TPU slice that need not be there, by a name such as v5e:4x4."""
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(f"--topology={name}: the TPU compiler is missing; install it with pip install 'elder_jax[tpu]'.")
  # No questions to a cloud that this machine may not be in, and no lines on what they did not find.
  for variable, value in (
    ('SKIP_MDS_QUERY', '1'),
    ('WORKER_HOSTNAMES', 'localhost'),
    ('ACCELERATOR_TYPE', 'v5litepod-4'),
  ):
    os.environ.setdefault(f'TPU_{variable}', value)
  # Of v4's two cores a program sees one device, as on the real machine.
  options = {'chip_config_name': 'megacore'} if name.startswith('v4') else {}
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except Exception as e:  # it raises many kinds for a name that it does not know  # noqa: BLE001
    raise InputError(
      f'--topology={name}: cannot be had ({reason(e)}); give a generation and its chips, as in v5e:4x4 or v4:2x2x2.'
    ) from e


def _architecture(config: Config) -> tuple[Spec, int, str]:
  """(Spec, number of layers, type of the weights)."""
  if config.model and user_path(config.model).suffix != '.gguf':
    found = checkpoint_hf.read_config(config.model)
    return *checkpoint_hf.architecture(config.model, found), found.get('dtype') or found.get('torch_dtype') or 'float32'
  with tempfile.TemporaryDirectory() as scratch:
    source = checkpoint_hf.open_source(config.model, pathlib.Path(scratch))
  return source.spec, source.num_layers, source.dtype
