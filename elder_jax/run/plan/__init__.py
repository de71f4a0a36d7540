"""The plan of a run, before anything is loaded: bytes per device and time of every stage, and whether it fits."""

from collections.abc import Callable
import importlib.util
import os
import pathlib
import tempfile

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import DOES_NOT_FIT
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf.source import architecture
from elder_jax.hf.source import open_source
from elder_jax.hf.source import read_config
from elder_jax.log import log
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.run import by_name
from elder_jax.run.config import Config
from elder_jax.run.how_much import count_removed
from elder_jax.run.job import Job
from elder_jax.run.plan.advice import advice
from elder_jax.run.plan.compile import Needs
from elder_jax.run.plan.compile import measure
from elder_jax.run.plan.programs import heaviest
from elder_jax.run.plan.programs import programs_by_stage
from elder_jax.run.plan.programs import shapes_of
from elder_jax.run.plan.seconds import measure_speed
from elder_jax.run.plan.seconds import seconds_by_stage
from elder_jax.run.plan.seconds import seconds_table
from elder_jax.run.plan.table import gib
from elder_jax.run.plan.table import plan_table
from elder_jax.run.prepare import check_recipes
from elder_jax.run.prepare import check_sizes
from elder_jax.run.stages import Stage
from elder_jax.run.stages import stages as list_stages


class DoesNotFit(RuntimeError):
  """The devices have too little memory for a run. Nothing was loaded."""


def describe(shapes: Shapes, programs: list[Program], compile_it: bool) -> tuple[str, list[Needs]]:
  """Returns (the plan as text, the programs that do not fit).

  Args:
    compile_it: compile each program. Without it, activations are unknown.
  """
  with jax.set_mesh(shapes.mesh):
    needs = [measure(p, shapes.mesh, compile_it) for p in programs]
  if not needs:
    return 'nothing is computed on the devices', []
  lines, too_large = [plan_table(needs, shapes.mesh)], [n for n in needs if not n.fits]
  for n in too_large:
    where = 'host' if n.program.host else 'device'
    lines.append(f'{n.program.name} needs {gib(n.peak)} GiB, the {where} has {gib(n.limit)}. Options:')
    lines += [f'  {line}' for line in advice(n, shapes)]
  if not too_large:
    lines.append('All stages fit.' if compile_it else 'All stages fit, not counting activations.')
  return '\n'.join(lines), too_large


def check(job: Job, stages: list[Stage], say: Callable[[str], None]) -> dict[int, float]:
  """Prints the plan of a run that is about to load its model. Does not compile on a CPU, where that takes too long.

  Returns:
    {index of a stage: FLOPs of the model in it}, to estimate the time left.

  Raises:
    DoesNotFit: the run does not fit and --force is not given.
  """
  config, source, mesh = job.config, job.source, job.mesh
  teacher = (job.teacher.spec, job.teacher.num_layers) if job.teacher else None
  shapes = shapes_of(config, source.spec, source.num_layers, job.num_removes, mesh, source.dtype, teacher)
  by_stage = programs_by_stage(shapes, stages)
  compile_it = mesh.devices.flat[0].platform != 'cpu'
  text, too_large = describe(shapes, heaviest(by_stage), compile_it)
  say(text)
  if too_large and not config.computation.force:
    names = ', '.join(needs.program.name for needs in too_large)
    raise DoesNotFit(f'the run does not fit: {names}; use one of the options above, or start it anyway with --force')
  return {i: sum(p.model_flops * p.calls for p in programs) for i, programs in enumerate(by_stage)}


def plan(config: Config) -> int:
  """Prints the plan and returns the exit status: 0, or DOES_NOT_FIT. Needs no weights; config.json is enough.

  Raises:
    InputError: bad settings or models.
  """
  if config.computation.topology:
    jax.config.update('jax_platforms', 'cpu')  # nothing runs on the TPUs
  if why := by_name.why(config):
    print(f'Nothing is loaded or computed, and layers are copied from file to file: {why}.')
    return 0
  spec, num_layers, dtype = _architecture(config.paths.model)
  teacher = _architecture(config.paths.teacher)[:2] if config.paths.teacher else None
  num_removes = count_removed(config, spec, num_layers, dtype)
  check_recipes(config, spec, num_removes)
  if config.removal.max_ppl_increase is not None:
    log(f'planning for {num_removes[0]} layers; the run itself finds how many layers --max_ppl_increase allows')
  name = config.computation.topology
  mesh = sharding.make_mesh(config.computation.mesh, topology(name) if name else None)
  config = config.with_dtype(lambda: about.fast_dtype(mesh.devices.flat[0]))
  check_sizes(config, spec, num_layers, mesh)
  shapes, listed, by_stage = _laid_out(config, spec, num_layers, num_removes, mesh, dtype, teacher)
  text, too_large = describe(shapes, heaviest(by_stage), compile_it=True)
  if not too_large and not name and (programs := [p for of_stage in by_stage for p in of_stage if p.model_flops]):
    with jax.set_mesh(mesh):
      speed = measure_speed(shapes, programs)
    text += '\n' + seconds_table(seconds_by_stage(listed, by_stage, speed), speed)
  if hosts.is_leader():
    print(text)
  return DOES_NOT_FIT if too_large else 0


def planned(
  config: Config,
  spec: Spec,
  num_layers: int,
  num_removes: list[int],
  mesh: Mesh,
  source_dtype: str = 'float32',
  teacher: tuple[Spec, int] | None = None,
) -> tuple[Shapes, list[Program]]:
  """Returns the arguments of `describe` for a run with these settings."""
  shapes, _, by_stage = _laid_out(config, spec, num_layers, num_removes, mesh, source_dtype, teacher)
  return shapes, heaviest(by_stage)


def _laid_out(
  config: Config, spec: Spec, num_layers: int, num_removes: list[int], mesh: Mesh, source_dtype: str, teacher
) -> tuple[Shapes, list[Stage], list[list[Program]]]:
  """Returns (shapes of a run, its stages, the programs of each)."""
  with jax.set_mesh(mesh):
    shapes = shapes_of(config, spec, num_layers, num_removes, mesh, source_dtype, teacher)
    # The check of the unpruned model in PyTorch is left out, because it depends on files that may not be there.
    listed = list_stages(config, num_removes, checks_source=False)
    return shapes, listed, programs_by_stage(shapes, listed)


def topology(name: str) -> list:
  """Returns the devices of a TPU slice, such as v5e:4x4, which need not be available.

  Raises:
    InputError: libtpu is missing, or does not support the name.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise InputError('topology', name, "the TPU compiler is missing; install it with pip install 'elder_jax[tpu]'.")
  # Keeps libtpu from querying a cloud's metadata server, which may not exist, and from logging the failures.
  for variable, value in (
    ('SKIP_MDS_QUERY', '1'),
    ('WORKER_HOSTNAMES', 'localhost'),
    ('ACCELERATOR_TYPE', 'v5litepod-4'),
  ):
    os.environ.setdefault(f'TPU_{variable}', value)
  # The two cores of a v4 chip are one device, as on the real machine.
  options = {'chip_config_name': 'megacore'} if name.startswith('v4') else {}
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except Exception as e:  # libtpu raises many types for an unknown name  # noqa: BLE001
    raise InputError(
      'topology',
      name,
      f'is not available ({reason(e)}); give a TPU generation and its chips, as in v5e:4x4 or v4:2x2x2.',
    ) from e


def _architecture(model: str) -> tuple[Spec, int, str]:
  """Returns (Spec, number of layers, type of the weights)."""
  if model and user_path(model).suffix != '.gguf':
    found = read_config(model)
    return *architecture(model, found), found.get('dtype') or found.get('torch_dtype') or 'float32'
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(model, pathlib.Path(scratch))
  return source.spec, source.num_layers, source.dtype
