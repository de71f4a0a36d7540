"""The list of stages of a run. prepare.py uses it to find what is read, the plan to cost it, pipeline.py to run it."""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

import jax

from elder_jax.hf import verify
from elder_jax.methods import find_method
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.recipes import find_recipe
from elder_jax.recipes import merging
from elder_jax.recipes import patch
from elder_jax.run import work
from elder_jax.run.config import Config
from elder_jax.text import perplexity
from elder_jax.text import zero_shot
from elder_jax.training.programs import trained_shapes
from elder_jax.training.programs import training_programs


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of a run between two points from which it can resume.

  name: of its result in stages/, and in the log. Several stages may share one result.
  title: printed when it starts.
  seconds: its key in the report's `seconds`.
  run: (Run, Stage) -> its result as JSON, or None.
  take: (Run, Stage, result): stores the result for later stages.
  keeps: whether its result is saved in stages/, so that it is not run again.
  programs: returns its heaviest programs.
  trains_on_text: whether it reads the training text.
  exported: whether its model is exported, which is the last row's.
  """

  name: str
  title: str
  seconds: str
  run: Callable[[Any, 'Stage'], dict | None]
  take: Callable[[Any, 'Stage', Any], None]
  programs: Callable[[Shapes], list[Program]]
  keeps: bool = True
  trains_on_text: bool = False
  method: str = ''
  num_remove: int = 0
  recipe: str = ''
  exported: bool = False

  @property
  def measures(self) -> bool:
    """It measures perplexity and tasks of a model."""
    return self.run in (work.measure_dense, work.measure_teacher, work.measure_row)

  @property
  def makes_model(self) -> bool:
    return self.run is work.treat


def stages(config: Config, num_removes: list[int], checks_source: bool = True) -> list[Stage]:
  """Returns the stages of a run in order.

  Args:
    num_removes: numbers of layers to remove; the first is for the exported model.
    checks_source: whether the model is first compared with the same model in PyTorch.
  """
  found = [Stage('load', 'loading the model', 'load', work.load_dense, work.take_nothing, _loading, keeps=False)]
  if checks_source:
    found.append(
      Stage('source', 'checking the model in PyTorch', 'check_source', work.check_source, work.take_nothing, _source)
    )
  found.append(
    Stage('dense', 'measuring the dense model', 'dense', work.measure_dense, work.take_dense, _measuring_dense)
  )
  if config.paths.teacher and find_recipe(config.removal.recipe).heals:
    title = 'measuring the teacher'
    found.append(Stage('teacher', title, 'teacher', work.measure_teacher, work.take_figures, _measuring_teacher))
  methods = config.methods() or [work.GIVEN]
  found += [_choosing(method, n, num_removes) for method in methods for n in num_removes]
  rows = [(method, n, recipe) for method in methods for n in num_removes for recipe in config.recipes()]
  exported = methods[0], num_removes[0], config.removal.recipe
  for row in sorted(rows, key=lambda row: row == exported):
    method, n, recipe = row
    name = _file_name(recipe if len(rows) == len(config.recipes()) else f'{method}-{n}-{recipe}')
    of_row = {'method': method, 'num_remove': n, 'recipe': recipe, 'exported': row == exported}
    reads = config.trains(recipe) or (find_recipe(recipe).reads_text and n > 0)
    treating = functools.partial(_treating, method=method, recipe=recipe, num_remove=n)
    title = f'{name}: removing {n} layers'
    found.append(Stage(name, title, f'train_{name}', work.treat, work.take_nothing, treating, False, reads, **of_row))
    measuring = functools.partial(_measuring, recipe=recipe, num_remove=n)
    found.append(
      Stage(name, f'measuring {name}', f'evaluate_{name}', work.measure_row, work.take_row, measuring, **of_row)
    )
  title = 'writing and checking the export'
  return [*found, Stage('export', title, 'export', work.export, work.take_export, _export, keeps=False)]


def _file_name(name: str) -> str:
  return re.sub(r'[^\w.-]', '_', name)  # a user's own entry has a colon: package.module:NAME


def _choosing(method: str, num_remove: int, num_removes: list[int]) -> Stage:
  """The stage in which a method chooses layers. A nested method runs once, for the largest number of layers."""
  if method == work.GIVEN:
    given = {'method': method, 'num_remove': num_remove}
    return Stage('given', 'taking the given layers', 'given', work.take_given, work.take_choice, _nothing, **given)
  entry = find_method(method)
  most = max(num_removes) if entry.nested else num_remove
  name = _file_name(f'choose-{method}-{most}')
  return Stage(
    name,
    f'choosing {num_remove} layers by {method}',
    name,
    functools.partial(work.choose, most=most),
    work.take_choice,
    functools.partial(_method_programs, method=method, num_remove=most),
    trains_on_text=num_remove > 0,
    method=method,
    num_remove=num_remove,
  )


# ---- the programs of each stage ----


def _nothing(shapes: Shapes) -> list[Program]:
  del shapes
  return []


def _loading(shapes: Shapes) -> list[Program]:
  return [Program('loading', None, (), 0, device_bytes(shapes.dense))]


def _source(shapes: Shapes) -> list[Program]:
  """32 tokens through both models; the one in PyTorch runs in float32 on the host."""
  call, args = verify.program(shapes.dense, shapes.settings.computation.dtype, 32)
  size = device_bytes(args[0])
  jax_side = Program('checking the model', call, args, shapes.flops(tokens=32, seq_len=32), size)
  torch_bytes = verify.torch_bytes(pruning.num_params(shapes.dense))
  return [jax_side, Program('checking the model in PyTorch', None, (), 0, torch_bytes, host=True)]


def _measuring_dense(shapes: Shapes) -> list[Program]:
  return evaluation_programs(shapes, shapes.dense)


def _measuring_teacher(shapes: Shapes) -> list[Program]:
  return evaluation_programs(shapes, shapes.teacher) if shapes.teacher is not None else []


def _method_programs(shapes: Shapes, method: str, num_remove: int) -> list[Program]:
  entry = find_method(method)
  return entry.programs(shapes, num_remove) if entry.programs and num_remove else []


def _treating(shapes: Shapes, method: str, recipe: str, num_remove: int) -> list[Program]:
  entry, dense, n = find_recipe(recipe), shapes.dense, num_remove
  trains = shapes.settings.trains(recipe)
  whole = entry.removes_last and trains
  own_teacher = trains and shapes.settings.training.taught and not shapes.settings.paths.teacher
  teacher = device_bytes(dense.layers) if own_teacher else 0  # the other parameters are shared by both models
  found = entry.programs(shapes) if n else []
  if n and entry.merges and method != work.GIVEN and find_method(method).merges:
    found += merging.programs(shapes)
  if not whole:
    found.append(pruning.removal_program('removing layers', dense, n, keeps=bool(teacher)))
  if trains:
    found += training_programs(shapes, dense if whole else _start(shapes, recipe, n), recipe)
  if whole:
    trained = trained_shapes(shapes, dense, recipe)
    found.append(pruning.removal_program('removing layers, as trained', trained, n, keeps=False, beside=teacher))
  return found


def _start(shapes: Shapes, recipe: str, num_remove: int) -> Decoder:
  """The model that a recipe makes from the dense one, after removal and before training."""
  start = pruning.cut_shapes(shapes.dense, num_remove)
  return patch.abstract(start) if find_recipe(recipe).patches else start


def _result(shapes: Shapes, recipe: str, num_remove: int) -> Decoder:
  start = _start(shapes, recipe, num_remove)
  return trained_shapes(shapes, start, recipe) if shapes.settings.trains(recipe) else start


def _measuring(shapes: Shapes, recipe: str, num_remove: int) -> list[Program]:
  return evaluation_programs(shapes, _result(shapes, recipe, num_remove))


def evaluation_programs(shapes: Shapes, model: Decoder) -> list[Program]:
  """The programs for perplexity and tasks of a model, while no other model is loaded."""
  name = f'{model.num_layers} layers' + (', patched' if model.spec.patched else '')
  dtypes = [{a.dtype for a in jax.tree.leaves(m.layers)} for m in (model, shapes.dense)]
  name += ', as trained' if dtypes[0] - dtypes[1] else ''
  settings, found = shapes.settings.evaluation, []
  if settings.eval_data:
    found.append(perplexity.program(shapes, model, name))
  if settings.tasks:
    found.append(zero_shot.program(shapes, model, name))
  return found


def _export(shapes: Shapes) -> list[Program]:
  """The export is written, read back and compared; never two models at a time."""
  config = shapes.settings
  pruned = _result(shapes, config.removal.recipe, shapes.num_removes[0])
  evaluation, data = config.evaluation, config.data
  length = evaluation.eval_seq_len if evaluation.eval_data else data.seq_len if data.train_data else 32
  call, args = verify.program(pruned, shapes.export_dtype, T := min(128, length))
  flops = shapes.flops(pruned.num_layers, T, T)
  found = [
    Program('export', None, (), 0, device_bytes(pruned)),
    Program('verification', call, args, flops, device_bytes(args[0])),
  ]
  if verify.use_torch(config.output.verify, size := pruning.num_params(pruned), say=lambda _: None):
    found.append(Program('verification in PyTorch', None, (), 0, verify.torch_bytes(size), host=True))
  return found
