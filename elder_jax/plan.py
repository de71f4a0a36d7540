"""What a run will need, told before anything is loaded: bytes on each device and time of every stage, and if that fits.

Shapes come from jax.eval_shape, their parts per device from sharding.py's table, what computation needs beside them
from the compiler, which is asked with abstract arrays. With --topology it compiles for TPUs that need not be there.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import itertools
import math
import os
import pathlib
import re
import tempfile
from typing import Any

from flax import nnx
import jax
from jax.experimental import topologies
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import numpy as np

from elder_jax import absorb
from elder_jax import checkpoint_hf
from elder_jax import evaluate
from elder_jax import gates
from elder_jax import hosts
from elder_jax import importance
from elder_jax import job as job_lib
from elder_jax import judge
from elder_jax import merging
from elder_jax import regularize
from elder_jax import sharding
from elder_jax.config import TRAINED
from elder_jax.config import Config
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.model import Decoder
from elder_jax.model import Mode
from elder_jax.model import Spec

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


@dataclasses.dataclass(frozen=True)
class Program:
  """The heaviest jitted call of a stage and what it is called with; arrays are abstract and know their shardings."""

  name: str
  call: Callable
  args: tuple
  model_flops: float  # of one call on all devices, by formula: no recomputation
  # Bytes on each device.
  params: int
  opt_state: int = 0
  gradients: int = 0
  beside: int = 0  # models that are not arguments but there


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


# ---- sizes ----


def device_bytes(tree) -> int:
  """Bytes of a tree's arrays, abstract or not, on each device."""
  size = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
  return sum(size(a) for a in jax.tree.leaves(tree) if hasattr(a, 'sharding'))


def abstract_model(spec: Spec, num_layers: int, dtype: str, mesh: Mesh, flag: str) -> Decoder:
  """The Decoder as checkpoint_hf.load gives it, without its arrays."""
  model = checkpoint_hf.abstract(spec, num_layers)
  places = sharding.for_model(model, mesh, flag)
  kind = lambda p: 'float32' if p.get_metadata()['axes'] == 'L' else dtype  # gates
  shape = lambda p, place: p.replace(
    jax.ShapeDtypeStruct(p.get_value().shape, kind(p), sharding=place.get_value())
  )
  return jax.tree.map(shape, model, places, is_leaf=lambda a: isinstance(a, nnx.Variable))


def placed(tree, mesh: Mesh):
  """Abstract arrays of a training state with the shardings that it has."""
  put = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
  return jax.tree.map(put, tree, sharding.for_state(tree, mesh))


def forward_flops(spec: Spec, num_layers: int, seq_len: int) -> tuple[float, float, float]:
  """FLOPs per token of a forward pass: (in the layers' matrices, in attention's scores and sums, in the head).

  Two per weight and product; attention as the full square, the convention of model FLOPs utilisation (Chowdhery et al.,
  arXiv 2204.02311, appendix B).
  """
  sizes = spec.sizes(num_layers)
  D, N, K, H, F = (sizes[a] for a in 'DNKHF')
  weights = 2 * D * N * H + 2 * D * K * H + (3 if spec.gated_mlp else 2) * D * F
  return 2.0 * num_layers * weights, 4.0 * num_layers * seq_len * N * H, 2.0 * sizes['V'] * D


def training_flops(spec: Spec, num_layers: int, seq_len: int, trained: str) -> float:
  """FLOPs per token of a step: forward, to the activations, and to the weights that are trained (as train.mask)."""
  layers, attention, head = forward_flops(spec, num_layers, seq_len)
  to_weights = {'gates': 0, 'lora': 0, 'blocks': layers, 'all': layers + head}[trained]
  return 2 * (layers + head) + 3 * attention + to_weights


def traced_flops(jaxpr) -> float:
  """FLOPs of the matrix products in a jaxpr, all devices together; loops as often as they run, of branches the longest."""
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [traced_flops(j) for j in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * eqn.params.get('length', 1)
  return total


# ---- the stages of a run ----


def programs(config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh) -> list[Program]:
  """The stages of a run of these settings. The mesh must be set (jax.set_mesh), or one device is assumed."""
  mode = job_lib.mode(config)
  model = abstract_model(spec, num_layers, config.dtype, mesh, config.mesh)
  batch = lambda B, T, kind='int32': jax.ShapeDtypeStruct((B, T), kind, sharding=NamedSharding(mesh, sharding.BATCH))
  tokens_BT, tokens = batch(config.batch_size, config.seq_len), config.batch_size * config.seq_len
  whole = sum(forward_flops(spec, num_layers, config.seq_len))
  left = num_layers - min(num_removes)  # of runs to several depths the one that takes the most
  scores = config.remove_layers is None and any(num_removes)

  found, n = [], max(num_removes)
  several = [judge.methods(num_layers, n) if method == 'auto' else [method] for method in config.methods() if scores]
  for method in dict.fromkeys(itertools.chain(*several)):
    if method == 'elder':
      found.append(_gates(config, model, n, tokens_BT, mesh, mode))
    elif method == 'laco':
      call, args = merging.program(model, tokens_BT, mode)
      size = device_bytes(model)
      found.append(Program('choosing by laco', call, args, 2 * tokens * whole, size, beside=size))
    elif (step := importance.program(method, model, tokens_BT, n, mode)) is not None:
      call, args, passes = step
      gradients = device_bytes(args[0]) if method == 'taylor' else 0
      flops = passes * tokens * whole
      found.append(Program(f'choosing by {method}', call, args, flops, device_bytes(model), gradients=gradients))
  refits = [recipe.removesuffix('_then_train') for recipe in config.recipes() if any(num_removes)]
  if scores and 'auto' in config.methods() and judge.absorbs(spec):
    refits.insert(0, 'absorb')
  for recipe in dict.fromkeys(r for r in refits if r in ('absorb', 'replace_linear')):
    call, args = absorb.program(model, tokens_BT, recipe, mode)
    size = device_bytes(model)
    changed = device_bytes(model.layers.w_down)  # all else is shared with the dense model
    found.append(Program(recipe, call, args, tokens * whole, size, beside=changed))
  trained = [recipe for recipe in config.recipes() if recipe in TRAINED and config.steps() > 0]
  for whole_model in sorted({recipe == 'regularize' for recipe in trained}):
    found.append(_training(config, spec, num_layers if whole_model else left, model, tokens_BT, mesh, mode))
  if config.corpora() or config.task_names():
    # The pruned model, what was trained in float32, with the dense one beside it.
    kept = spec.with_layers(list(range(left)))
    pruned = abstract_model(kept, left, 'float32' if trained else config.dtype, mesh, config.mesh)
    B, T = config.eval_batch_size, config.eval_seq_len
    args = pruned, batch(B, T), batch(B, T, 'float32'), mode
    flops = B * T * sum(forward_flops(kept, left, T))
    size = device_bytes(pruned)
    found.append(Program('evaluation', evaluate.nll, args, flops, size, beside=device_bytes(model)))
  return found


def _gates(config: Config, model: Decoder, num_remove: int, tokens_BT, mesh: Mesh, mode: Mode) -> Program:
  settings = job_lib.gate_settings(config, model.num_layers, num_remove)
  terms = gates.terms(np.ones(model.num_layers, bool), settings.lambda1)
  flops = training_flops(model.spec, model.num_layers, config.seq_len, 'gates')
  begin = lambda model: gates.begin(model, settings, mode)
  return _steps('stage 1, gates', begin, model, None, tokens_BT, terms, flops, config, mesh)


def _training(config: Config, spec, num_layers: int, dense: Decoder, tokens_BT, mesh: Mesh, mode: Mode) -> Program:
  settings = job_lib.train_settings(config)
  whole = num_layers == dense.num_layers
  start = dense if whole else abstract_model(
    spec.with_layers(list(range(num_layers))), num_layers, config.dtype, mesh, config.mesh
  )  # fmt: skip
  name = f'training, {num_layers} layers'
  trained = 'lora' if config.lora_rank else config.trainable
  flops = training_flops(spec, num_layers, config.seq_len, trained)
  if config.distill:
    flops += sum(forward_flops(spec, dense.num_layers, config.seq_len))
  terms = regularize.penalty_terms(num_layers, [], settings, 0)
  begin = lambda model: regularize.begin(model, settings, mode)
  teacher = dense if config.distill else None
  program = _steps(name, begin, start, teacher, tokens_BT, terms, flops, config, mesh)
  # What training began with is still there: its layers, where they train, and the dense model's. The rest is shared.
  layers, rest = device_bytes(start.layers), device_bytes(start) - device_bytes(start.layers)
  beside = 0 if trained == 'lora' else layers
  if not config.distill:
    beside += (0 if whole else device_bytes(dense.layers)) + (rest if trained == 'all' else 0)
  elif whole:
    beside = 0
  return dataclasses.replace(program, beside=beside)


def _steps(name: str, begin, model: Decoder, teacher, tokens_BT, terms, flops: float, config: Config, mesh) -> Program:
  """Steps of training: begin(model) -> (step, state, frozen)."""
  made = []

  def shapes(model):
    step, state, frozen = begin(model)
    made.append(step)
    return state, frozen

  state, frozen = placed(jax.eval_shape(shapes, model), mesh)
  parts = 1 if config.grad_accum == 1 else 2  # the sum, and the part that is added to it
  return Program(
    name,
    made[0],
    (state, (frozen, teacher), tokens_BT, terms),
    flops * tokens_BT.size,
    params=device_bytes((state.trained, frozen, teacher)),
    opt_state=device_bytes(state.opt_state),
    gradients=parts * device_bytes(state.trained),
  )


# ---- what the compiler says ----


def measure(program: Program, mesh: Mesh, compile_it: bool = True) -> Stage:
  """The needs of a program; the mesh must be set."""
  device = mesh.devices.flat[0]
  peak_flops, limit = DEVICES.get(device.device_kind, (None, None))
  least = program.model_flops / mesh.size / peak_flops if peak_flops else None
  known = program.params + program.opt_state + program.gradients + program.beside
  stage = Stage(program, limit or _memory(device), known, None, None, least)
  if not compile_it:
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
    peak += 0 if used and used[1] == 'Used' else device_bytes(program.args)
    return dataclasses.replace(stage, peak=max(peak, stage.limit + 1) + program.beside)
  m = compiled.memory_analysis()
  taken = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  return dataclasses.replace(stage, peak=taken + program.beside, compiled=compiled)


def _memory(device) -> int:
  if device.platform == 'cpu':  # simulated devices share it
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') // jax.local_device_count()
  return device.memory_stats()['bytes_limit']


def table(stages: list[Stage], mesh: Mesh) -> str:
  """What people read: GiB per device, FLOPs and least time of a step."""
  gib = lambda n: f'{n / GIB:.3g}' if n < GIB else f'{n / GIB:.2f}'
  number = lambda n: '?' if n is None else f'{n:.3g}'
  rows = [
    ['stage', 'parameters', 'optimiser', 'gradients', 'other models', 'activations …', 'peak', 'TFLOP', 'done', 'least s']
  ]
  for s in stages:
    p = s.program
    rest = gib(max(0, s.peak - s.state)) if s.compiled or not s.fits else '?'
    peak = gib(s.peak) if s.compiled or not s.fits else f'> {gib(s.peak)}'
    sizes = [gib(n) for n in (p.params, p.opt_state, p.gradients, p.beside)]
    done = None if s.flops is None else s.flops / 1e12
    rows.append([p.name, *sizes, rest, peak, number(p.model_flops / 1e12), number(done), number(s.least_seconds)])
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
  if any(s.flops is None for s in stages):
    lines.append('What activations take is asked of the compiler by --plan; on a CPU that takes as long as a small run.')
  return '\n'.join(lines)


# ---- what to change ----


def advice(stage: Stage, config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh) -> list[str]:
  """Changes of flags that make a stage take less, the figures from shapes."""
  ways, cut = (mesh.shape[a] * mesh.shape[b] for a, b in (('data', 'fsdp'), ('fsdp', 'tp')))
  gib = lambda n: f'{n / GIB:.2f}'

  def change(**settings) -> str:
    """What parameters, optimiser state and gradients would take; nothing where that is no less, or cannot be."""
    changed = dataclasses.replace(config, **settings)
    try:
      other = sharding.make_mesh(changed.mesh, mesh.devices.flatten())
      with jax.set_mesh(other):
        again = programs(changed, spec, num_layers, num_removes, other)
    except InputError:
      return ''
    state = next(Stage(p, 0, 0, None, None, None).state for p in again if p.name == stage.program.name)
    flags = ' '.join(f'--{k}={v}' for k, v in settings.items())
    return f'{flags}: {gib(state)} instead of {gib(stage.state)} without activations' if state < stage.state else ''

  found = []
  if cut < mesh.size:
    found.append(change(mesh=f'1,{mesh.size // mesh.shape["tp"]},{mesh.shape["tp"]}'))
  if config.dtype == 'float32':
    found.append(change(dtype='bfloat16'))
  if stage.program.name.startswith('training'):
    found += [change(optimizer=kind) for kind in ('lion', 'adafactor') if config.moment_dtype == 'float32']
    if config.trainable == 'blocks' and not config.lora_rank:
      found.append(change(lora_rank=16))
  if stage.program.name == 'choosing by taylor':
    found.append('--method=cosine_block, or ppl: no gradients are needed')
  rows = config.batch_size // config.grad_accum // ways
  if stage.program.opt_state and config.remat != 'full':
    streams = num_layers * max(rows, 1) * config.seq_len * spec.d_model * jnp.dtype(config.dtype).itemsize
    found.append(f'--remat=full: of each layer only its input is kept, {gib(streams)} in all')
  if stage.program.opt_state and rows > 1 and config.batch_size % ways == 0:
    found.append(f'--grad_accum={config.batch_size // ways}: 1 sequence on a device at a time instead of {rows}')
  if stage.program.name == 'evaluation' and config.eval_batch_size > ways:
    found.append(f'--eval_batch_size={ways}: 1 window on a device at a time instead of {config.eval_batch_size // ways}')
  if stage.state > stage.limit:
    found.append(f'at least {math.ceil(stage.state * cut / stage.limit)} devices of this kind that share the weights')
  return [line for line in found if line]


# ---- the command, and the first lines of a run ----


def tell(config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh, compile_it: bool):
  """(text for people, whether all stages fit)."""
  with jax.set_mesh(mesh):
    stages = [measure(p, mesh, compile_it) for p in programs(config, spec, num_layers, num_removes, mesh)]
  if not stages:
    return 'nothing is computed on the devices', True
  lines = [table(stages, mesh)]
  for stage in stages:
    if not stage.fits:
      lines.append(f'{stage.program.name} does not fit into {stage.limit / GIB:.2f} GiB. Less take:')
      lines += [f'  {line}' for line in advice(stage, config, spec, num_layers, num_removes, mesh)]
  if all(stage.fits for stage in stages):
    lines.append('All stages fit.' if stages[0].compiled else 'What is known fits.')
  return '\n'.join(lines), all(stage.fits for stage in stages)


def of_run(job: job_lib.Run) -> str:
  """The plan of a run that is about to load its model. On a CPU the compiler would take longer than a small model does."""
  compile_it = job.mesh.devices.flat[0].platform != 'cpu'
  return tell(job.config, job.source.spec, job.source.num_layers, job.num_removes, job.mesh, compile_it)[0]


def main(config: Config) -> int:
  """--plan: prints, and returns the exit status: 0, or DOES_NOT_FIT. Needs no weights: config.json is enough.

  Raises:
    InputError.
  """
  if config.topology:
    jax.config.update('jax_platforms', 'cpu')  # the TPUs are only compiled for
  config.check()
  spec, num_layers = _architecture(config)
  num_removes = job_lib.count_removed(config, num_layers)
  mesh = sharding.make_mesh(config.mesh, topology(config.topology) if config.topology else None)
  job_lib.check_sizes(config, spec, num_layers, mesh)
  text, fits = tell(config, spec, num_layers, num_removes, mesh, compile_it=True)
  if hosts.leads():
    print(text)
  return 0 if fits else DOES_NOT_FIT


def topology(name: str) -> list:
  """The devices of a TPU slice that need not be there, by a name such as v5e:4x4."""
  if importlib.util.find_spec('libtpu') is None:
    raise InputError(f"--topology={name}: the TPU compiler is missing; install it with pip install 'elder_jax[tpu]'.")
  # No questions to a cloud that this machine may not be in, and no lines on what they did not find.
  for variable, value in (('SKIP_MDS_QUERY', '1'), ('WORKER_HOSTNAMES', 'localhost'), ('ACCELERATOR_TYPE', 'v5litepod-4')):
    os.environ.setdefault(f'TPU_{variable}', value)
  # Of v4's two cores a program sees one device, as on the real machine.
  options = {'chip_config_name': 'megacore'} if name.startswith('v4') else {}
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except Exception as e:  # it raises many kinds for a name that it does not know  # noqa: BLE001
    raise InputError(
      f'--topology={name}: cannot be had ({reason(e)}); give a generation and its chips, as in v5e:4x4 or v4:2x2x2.'
    ) from e


def _architecture(config: Config) -> tuple[Spec, int]:
  if config.model and user_path(config.model).suffix != '.gguf':
    return checkpoint_hf.architecture(config.model, checkpoint_hf.read_config(config.model))
  with tempfile.TemporaryDirectory() as scratch:
    source = checkpoint_hf.open_source(config.model, pathlib.Path(scratch))
  return source.spec, source.num_layers
