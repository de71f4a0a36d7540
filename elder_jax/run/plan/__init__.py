"""What a run will need, before anything is loaded: bytes on each device and time of every stage, and if that fits."""

from collections.abc import Callable
import importlib.util
import os
import pathlib
import tempfile

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

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
from elder_jax.run.plan.table import gib
from elder_jax.run.plan.table import plan_table
from elder_jax.run.prepare import check_recipes
from elder_jax.run.prepare import check_sizes
from elder_jax.run.stages import Stage
from elder_jax.run.stages import stages as list_stages


class DoesNotFit(RuntimeError):
  """A run that its devices have too little memory for; nothing was loaded."""


def describe(shapes: Shapes, programs: list[Program], compile_it: bool) -> tuple[str, list[Needs]]:
  """(text for people, the programs that do not fit)."""
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
    lines.append('All stages fit.' if compile_it else 'What is known fits.')
  return '\n'.join(lines), too_large


def check(job: Job, stages: list[Stage], say: Callable[[str], None]) -> dict[int, float]:
  """Says the plan of a run that is about to load its model. On a CPU, where the compiler would take longer than a small
  model does, only what is known without it.

  Returns:
    {number of a stage: FLOPs of the model in it}, for the time that is left.

  Raises:
    DoesNotFit: without --force.
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
    raise DoesNotFit(f'the run does not fit: {names}; change what the plan above lists, or start it anyway by --force')
  return {i: sum(p.model_flops * p.calls for p in programs) for i, programs in enumerate(by_stage)}


def plan(config: Config) -> int:
  """Prints the plan, and returns the exit status: 0, or DOES_NOT_FIT. Needs no weights: config.json is enough.

  Raises:
    InputError.
  """
  if config.computation.topology:
    jax.config.update('jax_platforms', 'cpu')  # the TPUs are only compiled for
  if why := by_name.why(config):
    print(f'Nothing is loaded or computed: {why}; layers are copied from file to file.')
    return 0
  spec, num_layers, dtype = _architecture(config.paths.model)
  teacher = _architecture(config.paths.teacher)[:2] if config.paths.teacher else None
  num_removes = count_removed(config, spec, num_layers, dtype)
  check_recipes(config, spec, num_removes)
  if config.removal.max_ppl_increase is not None:
    log(f'how many layers --max_ppl_increase allows is found when the run starts; planned for {num_removes[0]}')
  name = config.computation.topology
  mesh = sharding.make_mesh(config.computation.mesh, topology(name) if name else None)
  check_sizes(config, spec, num_layers, mesh)
  text, too_large = describe(*planned(config, spec, num_layers, num_removes, mesh, dtype, teacher), compile_it=True)
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
  """What `describe` takes, of a run of these settings."""
  with jax.set_mesh(mesh):
    shapes = shapes_of(config, spec, num_layers, num_removes, mesh, source_dtype, teacher)
    # PyTorch's reading of the model is left out: whether it is made depends on the files.
    return shapes, heaviest(programs_by_stage(shapes, list_stages(config, num_removes, checks_source=False)))


def topology(name: str) -> list:
  """The devices of a TPU slice that need not be there, by a name such as v5e:4x4."""
  if importlib.util.find_spec('libtpu') is None:
    raise InputError('topology', name, "the TPU compiler is missing; install it with pip install 'elder_jax[tpu]'.")
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
      'topology', name, f'cannot be had ({reason(e)}); give a generation and its chips, as in v5e:4x4 or v4:2x2x2.'
    ) from e


def _architecture(model: str) -> tuple[Spec, int, str]:
  """(Spec, number of layers, type of the weights)."""
  if model and user_path(model).suffix != '.gguf':
    found = read_config(model)
    return *architecture(model, found), found.get('dtype') or found.get('torch_dtype') or 'float32'
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(model, pathlib.Path(scratch))
  return source.spec, source.num_layers, source.dtype
