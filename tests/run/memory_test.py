"""Memory: limits of control groups, live arrays at each stage, all programs in the plan, and runs that do not fit."""

import logging
import math
import re

import jax
import pytest
import safetensors.torch
from tiny import config_of
from tiny import slow
from tiny import write_tiny_llama

from elder_jax.commands import prune
from elder_jax.commands.flags import Parsed
from elder_jax.devices import memory
from elder_jax.hf import verify
from elder_jax.methods import METHODS
from elder_jax.methods import elder
from elder_jax.recipes import RECIPES
from elder_jax.run import job as job_module
from elder_jax.run import pipeline
from elder_jax.run import plan as plan_lib
from elder_jax.run import work as work_module
from elder_jax.run.plan import compile as compile_lib
from elder_jax.training import trainer
from elder_jax.training.loop import run_steps
from elder_jax.training.step import make_step

GROUP = '/job/step'


@pytest.mark.parametrize(
  'lines, files, expected',
  [
    (f'0::{GROUP}', {'sys/fs/cgroup/job/step/memory.max': '3000\n'}, 3000),
    (f'0::{GROUP}', {'sys/fs/cgroup/job/step/memory.max': 'max\n', 'sys/fs/cgroup/job/memory.max': '5000\n'}, 5000),
    (f'0::{GROUP}', {'sys/fs/cgroup/memory.max': '7000\n'}, 7000),  # a container's root group
    (f'5:cpu:/x\n4:memory:{GROUP}', {'sys/fs/cgroup/memory/job/step/memory.limit_in_bytes': '4000\n'}, 4000),
    (f'4:cpu,memory:{GROUP}\n0::/', {'sys/fs/cgroup/memory/memory.limit_in_bytes': '6000\n'}, 6000),
    ('5:cpu:/a', {'sys/fs/cgroup/memory/a/memory.limit_in_bytes': '4000\n'}, 8000),
    (f'4:memory:{GROUP}', {'sys/fs/cgroup/memory/job/step/memory.limit_in_bytes': '9223372036854771712\n'}, 8000),
    (None, {}, 8000),
  ],
)
def test_memory_is_the_minimum_of_machine_and_control_groups(lines, files, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(memory.os, 'sysconf', lambda name: {'SC_PAGE_SIZE': 8, 'SC_PHYS_PAGES': 1000}[name])
  files = files | ({'proc/self/cgroup': lines} if lines else {})
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  assert memory.total(tmp_path) == expected


def test_plan_and_verification_use_it(monkeypatch):
  monkeypatch.setattr(memory, 'total', lambda: 10**9)
  assert compile_lib._memory(jax.devices()[0]) == 10**9 // jax.local_device_count()
  assert verify.use_torch('auto', 10**8) and not verify.use_torch('auto', 2 * 10**8)


def test_free_deletes_all_but_the_spared_arrays():
  a, b = jax.numpy.ones(3), jax.numpy.ones(4)
  memory.free({'a': a, 'b': b}, spare=[b])
  assert a.is_deleted() and not b.is_deleted()


def ids(tree) -> set[int]:
  return {id(a) for a in jax.tree.leaves(tree)}


def others(known: set[int]) -> list:
  """Shapes of all other live arrays, except tokens and small ones."""
  return [a.shape for a in jax.live_arrays() if id(a) not in known and a.size > 100 and a.dtype != 'int32']


LORA = dict(recipe='absorb_then_train', lora_rank=2)


@pytest.mark.parametrize(
  'options',
  [
    slow(dict(recipe='prune_then_train', compare=['none', 'absorb'])),
    slow(dict(recipe='regularize', compare=['prune_then_train'], trainable='all')),
    slow(dict(recipe='absorb_then_train', method='laco', compare=['prune_then_train'])),
    slow(dict(recipe='regularize', lora_rank=2, dtype='bfloat16')),
    dict(**LORA, distill=0.5, compare=['regularize']),
  ],
  ids=str,
)
def test_nothing_else_is_in_memory_during_training(settings, options, monkeypatch):
  fit, before, seen = run_steps, ids(jax.live_arrays()), []

  def spy(step_fn, state, fixed, *more):
    needed = ids((state, fixed))
    seen.append(others(before | needed))
    return fit(step_fn, state, fixed, *more)

  settings = {'compare': []} | settings | dict(method='shortgpt', eval_data=(), order='joint') | options
  monkeypatch.setattr(trainer, 'run_steps', spy)
  pipeline.run(config_of(**settings))
  assert seen == [[]] * (1 + ('regularize' in settings['compare'] or 'prune_then_train' in settings['compare']))


def test_nothing_else_is_in_memory_during_verification(settings, monkeypatch):
  before, seen, check = ids(jax.live_arrays()), [], verify._logits

  def spy(model, tokens_BT):
    needed = ids(model)
    seen.append(others(before | needed))
    return check(model, tokens_BT)

  monkeypatch.setattr(verify, '_logits', spy)
  pipeline.run(
    config_of(**settings | dict(method='last', recipe='prune_then_train', export_dtype='bfloat16', compare=[]))
  )
  assert seen == [[], [(1, 32, 263)]]  # then also the first model's logits, which a CPU does not copy


def test_lora_is_merged_in_the_export_type(settings, tmp_path, monkeypatch):
  merged, measure = {}, work_module.measure

  def spy(job, model, name, **more):
    merged[job.config.output.export_dtype, name] = model.layers.wq.get_value().dtype
    return measure(job, model, name, **more)

  monkeypatch.setattr(work_module, 'measure', spy)
  settings |= dict(method='last', recipe='prune_then_train', lora_rank=2, dtype='bfloat16', compare=[])
  files = {}
  for dtype in ('bfloat16', 'float32'):
    work = tmp_path / dtype
    report = pipeline.run(config_of(**settings | dict(export_dtype=dtype, workdir=str(work))))
    files[dtype] = safetensors.torch.load_file(work / 'export/model.safetensors'), report['rows']
    assert merged[dtype, 'prune_then_train'] == dtype
  assert files['bfloat16'][1] == files['float32'][1]  # perplexities, to the last bit
  for name, tensor in files['float32'][0].items():
    assert (tensor.bfloat16() == files['bfloat16'][0][name]).all()


# ---- the plan contains every program of a run ----


class Compiled(logging.Handler):
  """Collects (name, argument shapes) of each program that jax compiles with at least `least` elements as arguments."""

  def __init__(self, least: int):
    super().__init__()
    self.least, self.found = least, set()

  def emit(self, record):
    if not (
      match := re.match(r'Compiling jit\((\w+)\) with global shapes and types \((.*?)\)\. Arg', record.getMessage())
    ):
      return
    shapes = re.findall(r'(\w+)\[([\d,]*)\]', match[2])
    if sum(math.prod(map(int, filter(None, shape.split(',')))) for _, shape in shapes) >= self.least:
      self.found.add((match[1], tuple(sorted(shapes))))

  def __enter__(self):
    jax.clear_caches()
    jax.config.update('jax_log_compiles', True)
    logging.getLogger('jax').addHandler(self)
    return self

  def __exit__(self, *_):
    logging.getLogger('jax').removeHandler(self)
    jax.config.update('jax_log_compiles', False)


# Programs that need only the arrays of a stage in the plan: checksums of a saved training state, scores of a model.
WITHIN = {'_sums', '_products', '_magnitudes', '_channel_sums', '_middle_sums', '_nll_above'}


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    dict(method=','.join(METHODS), recipe='none', compare=[], num_remove=1),
    dict(method='laco', recipe='absorb_then_train', compare=[r for r in RECIPES if r != 'heal'], num_remove=1),
    dict(method='auto,uidl', ratio='0.12,0.25', recipe='none', compare=[], gate='output'),
    dict(method='last', recipe='regularize', compare=['none'], lora_rank=2, dtype='bfloat16', distill=0.5),
    dict(method='last', recipe='prune_then_train', compare=[], trainable='all', export_dtype='float16', gate='output'),
    dict(method='last', recipe='prune_then_train', compare=['regularize'], distill_hidden=0.5),
    dict(method='swaps', judge_steps=2, recipe='prune_then_train', compare=[], num_sequences=32, distill=0.5),
  ],
  ids=str,
)
def test_the_plan_contains_every_program_of_a_run(settings, options, tmp_path, monkeypatch):
  model = write_tiny_llama(tmp_path, num_hidden_layers=8)
  # Answers to a few short prompts are not in the plan, because evaluations need more.
  settings |= (
    dict(model=str(model), num_remove=None, order='joint', score_steps=1, gate_steps=1, prompts='none') | options
  )
  modes = []
  for module in (elder, trainer):
    monkeypatch.setattr(module, 'make_step', lambda tx, mode, *more: modes.append(mode) or make_step(tx, mode, *more))
  job = pipeline.prepare(config_of(**settings))
  size = sum(math.prod(shape) for shape in job.source.shapes.values())
  with Compiled(size // 2) as planned, jax.set_mesh(job.mesh):
    found = plan_lib.planned(job.config, job.source.spec, 8, job.num_removes, job.mesh, job.source.dtype)[1]
    for p in found:
      if p.call:
        p.call.lower(*p.args)
  modes_of_plan, modes[:] = set(modes), []
  with Compiled(size // 2) as done:
    pipeline.run(job.config)
  assert done.found and {name for name, _ in done.found} - WITHIN
  missing = {program for program in done.found - planned.found if program[0] not in WITHIN}
  near = {name: [set(args) ^ set(other) for same, other in planned.found if same == name] for name, args in missing}
  assert not missing, near
  assert set(modes) == modes_of_plan


# ---- runs that do not fit ----


@pytest.fixture
def small(settings, monkeypatch):
  monkeypatch.setattr(memory, 'total', lambda: 1000)
  return settings | dict(method='last', recipe='none', compare=[])


def test_a_run_that_does_not_fit_is_refused(small, monkeypatch, capsys):
  monkeypatch.setattr(prune.hosts, 'start', lambda launch: None)
  monkeypatch.setattr(prune.preemption, 'listen', lambda: None)
  monkeypatch.setattr(job_module, 'load_model', lambda *args: pytest.fail('the model was loaded'))
  with pytest.raises(SystemExit) as end:
    prune.run_config(Parsed({}, []), config_of(**small).flat())
  err = capsys.readouterr().err
  assert end.value.code == 3 and 'Options:' in err
  assert err.splitlines()[-1].startswith('elder_jax: the run does not fit: loading') and '--force' in err
  # The folder is free for settings that fit.
  monkeypatch.setattr(memory, 'total', lambda: 10**12)
  pipeline.prepare(config_of(**small | dict(num_remove=1)))


def test_force_starts_a_run_that_does_not_fit(small):
  assert pipeline.run(config_of(**small | dict(force=True)))['kept']


def test_a_forced_run_may_resume_without_force(small):
  pipeline.prepare(config_of(**small | dict(force=True)))
  pipeline.prepare(config_of(**small))
