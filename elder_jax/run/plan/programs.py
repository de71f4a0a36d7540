"""The programs of a run's stages, with abstract arrays: shapes from jax.eval_shape, shardings from sharding.py."""

import dataclasses

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from elder_jax.devices import sharding
from elder_jax.hf.table import abstract_model
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.run.config import Config
from elder_jax.run.stages import Stage


def shapes_of(
  config: Config,
  spec: Spec,
  num_layers: int,
  num_removes: list[int],
  mesh: Mesh,
  source_dtype: str = 'float32',
  teacher: tuple[Spec, int] | None = None,
) -> Shapes:
  """Returns the shapes that determine the programs of a run.

  Args:
    source_dtype: hf.source.Source.dtype.
    teacher: Spec and number of layers of --teacher.
  """
  batch = jax.ShapeDtypeStruct(
    (config.data.batch_size, config.data.seq_len), 'int32', sharding=NamedSharding(mesh, sharding.BATCH)
  )
  how = config.computation.dtype, mesh, config.computation.mesh
  dense = abstract_model(spec, num_layers, *how)
  taught_by = abstract_model(*teacher, *how) if teacher else None
  export_dtype = config.output.export_dtype or source_dtype
  return Shapes(dense, batch, config.mode(), mesh, config, export_dtype, tuple(num_removes), taught_by)


def programs_by_stage(shapes: Shapes, stages: list[Stage]) -> list[list[Program]]:
  """Returns the heaviest programs of each stage; none for a run that only copies files."""
  config = shapes.settings
  reads = any(stage.trains_on_text for stage in stages) or config.evaluation.eval_data or config.evaluation.tasks
  if config.recipes() == ['none'] and not reads:
    return [[] for _ in stages]
  return [stage.programs(shapes) for stage in stages]


def heaviest(by_stage: list[list[Program]]) -> list[Program]:
  """Returns one program per name. Programs that several methods or recipes share are listed once."""
  found: dict[str, Program] = {}
  for program in [p for of_stage in by_stage for p in of_stage]:
    before = found.get(program.name, program)
    chosen = max(before, program, key=lambda p: p.params + p.beside)
    found[program.name] = dataclasses.replace(chosen, calls=max(before.calls, program.calls))
  return list(found.values())
