"""The plan of a run: its bytes compared with real arrays, FLOPs, and runs that do not fit."""

import dataclasses
import gc
import json
import math
import re

import jax
import numpy as np
import pytest
from tiny import config_of

from elder_jax.devices import memory
from elder_jax.devices import sharding
from elder_jax.errors import DOES_NOT_FIT
from elder_jax.errors import InputError
from elder_jax.hf.table import abstract_model
from elder_jax.methods import METHODS
from elder_jax.model import program as program_lib
from elder_jax.model.program import Program
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Spec
from elder_jax.recipes import RECIPES
from elder_jax.run import plan as plan_lib
from elder_jax.run.plan import compile as compile_lib
from elder_jax.run.plan.advice import advice
from elder_jax.training.penalty import penalty_terms
from elder_jax.training.trainer import begin_training

SPEC = Spec(
  vocab_size=320,
  d_model=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  d_ff=128,
  norm_eps=1e-5,
  tied=False,
  rope_freq_RH=((1.0, 0.1),),
)
L = 4
CONFIG = config_of(
  model='m',
  plan=True,
  method='elder',
  recipe='regularize',
  compare=(),
  train_steps=2,
  seq_len=32,
  eval_seq_len=32,
  num_sequences=8,
  batch_size=8,
  eval_batch_size=8,
  remat='none',
  eval_data=('a=b',),
  protect_first=1,
  protect_last=1,
  verify='jax',
)


def live_bytes() -> list[int]:
  """Bytes of all live arrays on each device."""
  on = dict.fromkeys(jax.devices(), 0)
  for array in jax.live_arrays():
    for shard in array.addressable_shards:
      on[shard.device] += shard.data.nbytes
  return list(on.values())


@pytest.mark.parametrize(
  'sizes, changes',
  [((1, 2, 2), {}), ((4, 1, 1), {'dtype': 'bfloat16', 'trainable': 'all'}), ((2, 2, 1), {'lora_rank': 4})],
)
def test_planned_bytes_match_the_devices(sizes, changes, eight_devices):
  """Compares two training steps, as in a run, with their plan."""
  config = CONFIG.replace(mesh=sizes, **changes)
  mesh = sharding.make_mesh(sizes, eight_devices[:4])
  with jax.set_mesh(mesh):
    planned = next(p for p in plan_lib.planned(config, SPEC, L, [1], mesh)[1] if p.name.startswith('training'))
    gc.collect()
    before = live_bytes()
    abstract = abstract_model(SPEC, L, config.computation.dtype, mesh, sizes)
    model = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, 0.01, a.dtype), a.sharding), abstract)
    settings = config.train_settings()
    step, state, frozen = begin_training(model, settings, config.mode(), memory.free)  # as in a run
    batch = sharding.put_batch(np.zeros((8, 32), np.int32), mesh)
    for i in range(2):
      state, metrics = step(state, (frozen, None), batch, penalty_terms(L, [], settings, i))
    jax.block_until_ready(metrics)
    held = max(after - at_first for after, at_first in zip(live_bytes(), before))
    needs = compile_lib.measure(planned, mesh)
    compiler = needs.compiled.memory_analysis().argument_size_in_bytes
  expected = planned.params + planned.opt_state + planned.beside + device_bytes(batch)
  print(f'{sizes} {changes}: planned / held {expected / held:.3f}')
  assert abs(expected / held - 1) < 0.15
  assert abs(device_bytes(planned.args) / compiler - 1) < 0.02
  assert needs.peak > held > 0


@pytest.fixture
def one_device():
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def programs(mesh, **changes) -> dict[str, Program]:
  return {p.name: p for p in plan_lib.planned(CONFIG.replace(**changes), SPEC, L, [1], mesh)[1]}


@pytest.mark.parametrize('changes', [{}, {'trainable': 'all'}, {'distill': 0.5}, {'distill_hidden': 0.5}])
def test_formula_and_program_agree_on_flops(changes, one_device):
  found = programs(one_device, recipe='prune_then_train', **changes)
  computed = [p for p in found.values() if p.model_flops]
  assert [p.name for p in computed] == [
    'evaluation, 4 layers',
    'stage 1, gates',
    'training, 3 layers',
    'evaluation, 3 layers',
    'verification',
  ]
  for p in computed:
    traced = compile_lib.traced_flops(p.call.trace(*p.args).jaxpr.jaxpr)
    # If the head is trained, the backward pass recomputes the logits.
    head_again = 2 * SPEC.d_model * SPEC.vocab_size * 8 * 32
    again = head_again if 'trainable' in changes and 'training' in p.name else 0
    assert traced - again == p.model_flops, p.name


def test_traced_flops_include_recomputation(one_device):
  at = {remat: programs(one_device, remat=remat)['training, 4 layers'] for remat in ('none', 'full')}
  flops = {remat: compile_lib.traced_flops(p.call.trace(*p.args).jaxpr.jaxpr) for remat, p in at.items()}
  layers, attention, _ = program_lib.forward_flops(SPEC, L, 32)
  assert flops['full'] - flops['none'] == (layers + attention) * 8 * 32  # one more forward pass, without the head
  assert at['full'].model_flops == at['none'].model_flops


CHOOSE_BY_STEPS = ('auto', 'swaps', 'mask', 'elder')  # or by the choices of other methods


def test_every_method_and_recipe_has_a_plan(one_device):
  """Covers all of METHODS and RECIPES, so that a new entry is planned as well."""
  settings = dict(
    protect_first=1, protect_last=1, verify='torch', compare=tuple(RECIPES), recipe='none', num_sequences=16
  )
  found = {
    p.name: p for p in plan_lib.planned(CONFIG.replace(method=tuple(METHODS), **settings), SPEC, 9, [1], one_device)[1]
  }
  reading = {f'choosing by {name}' for name, m in METHODS.items() if m.reads_text and name not in CHOOSE_BY_STEPS}
  assert reading | {'stage 1, gates', 'learning a mask', 'judging, 8 layers'} <= found.keys()
  of_recipes = {
    'absorb',
    'replace_linear',
    'prune_comp',
    'linear_patch',
    'ghosted',
    'training, 8 layers',
    'training, 9 layers',
    'merging layers',
  }
  assert of_recipes | {'removing layers', 'removing layers, as trained'} <= found.keys()
  assert {'loading', 'evaluation, 9 layers', 'evaluation, 8 layers', 'export', 'verification'} <= found.keys()
  assert found['verification in PyTorch'].host
  for p in found.values():
    assert p.params > 0 and p.calls > 0
    if p.call:
      p.call.trace(*p.args)


@pytest.mark.parametrize('block, refits', [('pre', ['absorb, streams', 'absorb']), ('post', [])])
def test_the_plan_of_auto_contains_every_candidate(one_device, block, refits):
  config = CONFIG.replace(method=('auto',), recipe='prune_then_train' if block == 'post' else 'absorb_then_train')
  shapes, found = plan_lib.planned(config, dataclasses.replace(SPEC, block=block), 8, [1], one_device)
  choosing = [f'choosing by {method}' for method in ('cosine_block', 'shortgpt', 'taylor', 'ppl')]
  judging = [*refits, 'judging, removing layers', 'judging, 7 layers', 'removing layers', 'training, 7 layers']
  assert [p.name for p in found] == [
    'loading',
    'evaluation, 8 layers',
    *choosing,
    *judging,
    'evaluation, 7 layers',
    'export',
    'verification',
  ]
  taylor = next(stage for stage in found if stage.name == 'choosing by taylor')
  needs = compile_lib.measure(dataclasses.replace(taylor, gradients=1 << 60), one_device, compile_it=False)
  assert '--method=cosine_block or --method=ppl: need no gradients' in advice(needs, shapes)


def test_a_teacher_of_its_own_size(one_device):
  """heal: the teacher has more layers than the model and shares no arrays with it."""
  config = CONFIG.replace(distill=0.5)
  alone = programs(one_device)['training, 4 layers']
  shapes, found = plan_lib.planned(config, SPEC, L, [1], one_device, teacher=(SPEC, 3 * L))
  taught = next(p for p in found if p.name == 'training, 4 layers')
  teacher = sum(4 * math.prod(a.shape) for a in jax.tree.leaves(abstract_model(SPEC, 3 * L, 'float32', one_device, ())))
  assert (taught.params, taught.twice) == (alone.params + teacher, 0)
  of_dense = programs(one_device, distill=0.5)['training, 4 layers']
  assert taught.model_flops > of_dense.model_flops > alone.model_flops and shapes.teacher.num_layers == 3 * L


def test_bytes_of_each_kind(one_device):
  p = programs(one_device)['training, 4 layers']
  model = abstract_model(SPEC, L, 'float32', one_device, ())
  blocks = sum(math.prod(a.shape) for a in jax.tree.leaves(model.layers))
  rest = sum(math.prod(a.shape) for a in jax.tree.leaves(model)) - blocks
  assert (p.params, p.gradients, p.beside) == (4 * (blocks + rest), 4 * blocks, 0)
  taught = programs(one_device, distill=0.5)['training, 4 layers']  # the frozen parameters are shared with the teacher
  assert (taught.params, taught.twice) == (p.params + 4 * blocks, 4 * rest)
  hidden = programs(one_device, distill_hidden=0.5)['training, 4 layers']
  assert (hidden.params, hidden.twice) == (taught.params, taught.twice)
  assert 8 * blocks <= p.opt_state < 8 * blocks + 100  # two moments and counters
  assert programs(one_device, grad_accum=2)['training, 4 layers'].gradients == 8 * blocks
  assert programs(one_device, optimizer='lion')['training, 4 layers'].opt_state < 4 * blocks + 100
  assert programs(one_device, lora_rank=2)['training, 4 layers'].opt_state < blocks
  gates = programs(one_device, dtype='bfloat16')['stage 1, gates']
  assert gates.params == 2 * (blocks + rest - L) + 4 * L and gates.gradients == 4 * L


@pytest.fixture
def bare(tmp_path):
  """A config.json without weights."""
  config = dict(
    model_type='llama',
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    hidden_act='silu',
    tie_word_embeddings=False,
  )
  (tmp_path / 'config.json').write_text(json.dumps(config))
  return CONFIG.replace(model=str(tmp_path), method=('random',), mesh=(1, 1, 1))


def test_a_config_is_enough_and_a_fitting_plan_exits_with_0(bare, capsys):
  assert plan_lib.plan(bare) == 0
  out = capsys.readouterr().out
  assert 'All stages fit.' in out and 'training, 4 layers' in out and 'evaluation' in out and '?' in out


def test_only_config_json_of_a_hub_id_is_fetched(bare, capsys, monkeypatch):
  asked = []

  def fetch(hub_id, allow_patterns):
    return asked.append((hub_id, allow_patterns)) or bare.paths.model

  monkeypatch.setattr('huggingface_hub.snapshot_download', fetch)
  assert plan_lib.plan(bare.replace(model='someone/model')) == 0
  assert asked == [('someone/model', ['config.json'])] and 'All stages fit.' in capsys.readouterr().out


def test_a_plan_that_does_not_fit_exits_with_3_and_lists_options(bare, capsys, monkeypatch):
  monkeypatch.setattr(compile_lib, '_memory', lambda device: 1_000_000)
  assert plan_lib.plan(bare) == DOES_NOT_FIT == 3
  out = capsys.readouterr().out
  assert re.search(r'\ntraining, 4 layers needs 0\.0\d+ GiB, the device has 0\.000931\. Options:\n', out)
  for flag in ('--dtype=bfloat16: 0', '--optimizer=lion: 0', '--lora_rank=16: 0', '--remat=full: ', '--grad_accum=8: '):
    assert f'\n  {flag}' in out, out


def test_a_program_that_the_compiler_rejects_does_not_fit(one_device):
  class Refused:
    def trace(self, *args):
      return self

    jaxpr = jax.make_jaxpr(lambda: 1)()
    lower = compile = lambda self: self

  sentence = (
    'RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (51.25G) exceeds available HBM (15.75G).'
  )

  def refuse(self):
    raise jax.errors.JaxRuntimeError(sentence)

  call = Refused()
  call.jaxpr = type('Closed', (), {'jaxpr': jax.make_jaxpr(lambda x: x)(1.0).jaxpr})
  Refused.compile = refuse
  stage = compile_lib.measure(Program('p', call, (np.zeros(1),), 1.0, params=0, beside=7), one_device)
  assert stage.peak == 51.25 * 2**30 + 7 and not stage.fits


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (
      {'topology': 'v5e:4x4'},
      "--topology=v5e:4x4: the TPU compiler is missing; install it with pip install 'elder_jax",
    ),
    ({'topology': 'v5e:4x4', 'plan': False}, '--topology=v5e:4x4: can only be planned for; add --plan.'),
    ({'mesh': (3, 1, 1)}, '--mesh=3,1,1: needs 3 devices, there are 1'),
  ],
)
def test_refusals(bare, changes, sentence, monkeypatch):
  monkeypatch.setattr(plan_lib.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError) as caught:
    plan_lib.plan(bare.replace(**changes))
  assert caught.value.for_command().startswith(sentence)
