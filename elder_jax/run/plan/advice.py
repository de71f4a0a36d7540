"""Options for a stage that does not fit."""

import math

import jax
import jax.numpy as jnp

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.model.program import Shapes
from elder_jax.run.plan.compile import Needs
from elder_jax.run.plan.programs import heaviest
from elder_jax.run.plan.programs import programs_by_stage
from elder_jax.run.plan.programs import shapes_of
from elder_jax.run.plan.table import gib
from elder_jax.run.stages import stages


def advice(needs: Needs, shapes: Shapes) -> list[str]:
  """Returns changes of settings that reduce the memory of a stage, with sizes computed from shapes."""
  program, config, mesh = needs.program, shapes.settings, shapes.mesh
  if program.host:
    return ['--verify=jax: checks the export without PyTorch']
  cut = mesh.shape['fsdp'] * mesh.shape['tp']
  found = [_change(needs, shapes, **settings) for settings in _smaller(needs, shapes)]
  if program.name.startswith('choosing by ') and program.gradients:
    found.append('--method=cosine_block or --method=ppl: need no gradients')
  elif program.name.startswith(('choosing by ', 'judging')):
    found.append('--method=cosine_block: needs one model and one pass')
  if config.training.lora_rank and config.computation.dtype != 'float32':
    found.append(_change(needs, shapes, export_dtype=config.computation.dtype))
  found += _fewer_rows(needs, shapes)
  if program.state > needs.limit:
    found.append(f'at least {math.ceil(program.state * cut / needs.limit)} devices of this type with sharded weights')
  return [line for line in found if line]


def _smaller(needs: Needs, shapes: Shapes) -> list[dict]:
  """Settings that may reduce parameters, optimiser state or gradients."""
  config, mesh, found = shapes.settings, shapes.mesh, []
  training = config.training
  if mesh.shape['fsdp'] * mesh.shape['tp'] < mesh.size:
    found.append({'mesh': (1, mesh.size // mesh.shape['tp'], mesh.shape['tp'])})
  if config.computation.dtype == 'float32':
    found.append({'dtype': 'bfloat16'})
  if needs.program.name.startswith('training'):
    found += [{'optimizer': kind} for kind in ('lion', 'adafactor') if training.moment_dtype == 'float32']
    if training.trainable == 'blocks' and not training.lora_rank:
      found.append({'lora_rank': 16})
  return found


def _change(needs: Needs, shapes: Shapes, **settings) -> str:
  """Describes the memory of a stage after a change, without activations. '' if it is not smaller, or not possible."""
  mesh, name, state = shapes.mesh, needs.program.name, needs.program.state
  try:
    changed = shapes.settings.replace(**settings)
    other = sharding.make_mesh(changed.computation.mesh, mesh.devices.flatten())
    with jax.set_mesh(other):
      num_removes = list(shapes.num_removes)
      teacher = shapes.teacher and (shapes.teacher.spec, shapes.teacher.num_layers)
      again = shapes_of(changed, shapes.spec, shapes.num_layers, num_removes, other, shapes.export_dtype, teacher)
      found = heaviest(programs_by_stage(again, stages(changed, num_removes)))
  except InputError:
    return ''
  less = max((p.state for p in found if p.name.split(', as')[0] == name.split(', as')[0]), default=0)
  flags = ' '.join(f'--{k}={as_text(v)}' for k, v in settings.items())
  return f'{flags}: {gib(less)} GiB instead of {gib(state)}, without activations' if less < state else ''


def _fewer_rows(needs: Needs, shapes: Shapes) -> list[str]:
  """Settings that reduce activations."""
  config, mesh, found = shapes.settings, shapes.mesh, []
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  batch_size, eval_batch_size = config.data.batch_size, config.evaluation.eval_batch_size
  rows = batch_size // config.training.grad_accum // ways
  steps = needs.program.opt_state > 0
  if steps and config.computation.remat != 'full':
    itemsize = jnp.dtype(config.computation.dtype).itemsize
    streams = shapes.num_layers * max(rows, 1) * config.data.seq_len * shapes.spec.d_model * itemsize
    found.append(f'--remat=full: keeps only the input of each layer, {gib(streams)} GiB in total')
  if steps and rows > 1 and batch_size % ways == 0:
    found.append(f'--grad_accum={batch_size // ways}: 1 sequence per device at a time instead of {rows}')
  if needs.program.name.startswith('evaluation') and eval_batch_size > ways:
    found.append(f'--eval_batch_size={ways}: 1 window per device at a time instead of {eval_batch_size // ways}')
  return found
