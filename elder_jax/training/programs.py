"""Programs that predict the cost of training for the plan: the steps, merging LoRA, and the resulting model."""

from collections.abc import Callable
import dataclasses

import jax

from elder_jax.devices import sharding
from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.matrices import is_layer_matrix
from elder_jax.model.matrices import layer_matrices
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.program import forward_flops
from elder_jax.model.program import training_flops
from elder_jax.training.step import combine
from elder_jax.training.step import train_mask
from elder_jax.training.terms import loss_terms
from elder_jax.training.trainer import begin_training


def trained_shapes(shapes: Shapes, start: Decoder, recipe: str) -> Decoder:
  """The abstract model that a recipe trains from `start`."""
  settings, dtype = shapes.settings.train_settings(recipe), 'float32'
  if settings.trained == 'lora':
    dtype = lora.merged_dtype(shapes.settings.computation.dtype, shapes.export_dtype)
    factored = layer_matrices(start.layers)
    changed = jax.tree_util.tree_map_with_path(
      lambda path, _: is_layer_matrix(path) and path[1].name in factored, start
    )
  else:
    changed = train_mask(start, settings.trained)

  def of_type(true, a):
    return jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding) if true else a

  return jax.tree.map(of_type, changed, start)


def steps_program(
  shapes: Shapes,
  name: str,
  begin: Callable,
  model: Decoder,
  teacher: Decoder | None,
  terms: dict,
  flops: float,
  calls: int,
) -> Program:
  """The program of a training step.

  Args:
    shapes: abstract inputs of the run.
    name: in the plan.
    begin: model -> (step, state, frozen).
    model: the abstract model that is trained.
    teacher: the abstract teacher, or None.
    terms: of losses.loss.
    flops: per token.
    calls: number of steps.
  """
  made = []

  def states(model):
    step, state, frozen = begin(model)
    made.append(step)
    return state, frozen

  def put(a, place):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)

  abstract = jax.eval_shape(states, model)
  state, frozen = jax.tree.map(put, abstract, sharding.for_state(abstract, shapes.mesh))
  parts = 1 if shapes.settings.training.grad_accum == 1 else 2  # the sum, and the micro-batch that is added to it
  return Program(
    name,
    made[0],
    (state, (frozen, teacher), shapes.tokens_BT, terms),
    flops * shapes.tokens_BT.size,
    params=device_bytes((state.trained, frozen, teacher)),
    opt_state=device_bytes(state.opt_state),
    gradients=parts * device_bytes(state.trained),
    calls=calls,
  )


def training_programs(shapes: Shapes, start: Decoder, recipe: str) -> list[Program]:
  """The training of a recipe from `start`. The teacher, often the dense model, stays in memory."""
  config, num_layers, seq_len = shapes.settings, start.num_layers, shapes.tokens_BT.shape[1]
  settings = config.train_settings(recipe)
  flops = training_flops(shapes.spec, num_layers, seq_len, settings.trained)
  taught_by = shapes.dense if shapes.teacher is None else shapes.teacher
  if settings.taught:
    of_layers, attention, head = forward_flops(taught_by.spec, taught_by.num_layers, seq_len)
    flops += of_layers + attention + (head if settings.distils else 0)
  terms = loss_terms(num_layers, [], settings, 0)

  def begin(model):
    return begin_training(model, settings, shapes.mode)

  teacher = taught_by if settings.taught else None
  name = f'training, {num_layers} layers' + (', patched' if start.spec.patched else '')
  name += f', {settings.only} alone' if settings.only else ''
  program = steps_program(shapes, name, begin, start, teacher, terms, flops, settings.steps)
  state, (frozen, teacher), *_ = program.args
  if settings.taught and shapes.teacher is None:  # frozen, uncut arrays are shared with the dense model
    layers = jax.tree.leaves((frozen.layers, frozen.gate_L))
    shared = device_bytes(frozen) - (0 if start is shapes.dense else device_bytes(layers))
    program = dataclasses.replace(program, params=program.params - shared, twice=shared)
  if settings.trained != 'lora':
    return [program]
  # The worst case: the largest matrix is merged last, when all others are merged and the optimiser state is still alive.
  merged_dtype = lora.merged_dtype(config.computation.dtype, shapes.export_dtype)
  call, args = lora.program(combine(state.trained, frozen), merged_dtype)
  *_, base, a, b = args
  result = trained_shapes(shapes, start, recipe)
  largest = max(device_bytes(p) for p in jax.tree.leaves(result.layers))
  beside = device_bytes(result) - largest + device_bytes(state) - device_bytes((a, b))
  if teacher is not None:  # only a separate teacher has its own embedding and head
    beside += device_bytes(teacher if shapes.teacher is not None else teacher.layers)
  return [program, Program('merging LoRA', call, args, 0, device_bytes((base, a, b)), beside=beside)]
