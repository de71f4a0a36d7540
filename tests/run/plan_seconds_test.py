"""The plan's estimate of seconds: what is timed, and how stages are added up."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_spec

from elder_jax.devices import about
from elder_jax.devices import sharding
from elder_jax.model.program import Program
from elder_jax.model.spec import Delta
from elder_jax.model.spec import Spec
from elder_jax.run.plan import seconds as seconds_lib
from elder_jax.run.plan.programs import programs_by_stage
from elder_jax.run.plan.programs import shapes_of
from elder_jax.run.stages import stages

LLAMA_7B = Spec(
  vocab_size=32000,
  d_model=4096,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
  d_ff=11008,
  norm_eps=1e-5,
  tied=False,
  rope_freq_RH=((1.0,) * 64,),
)


@pytest.fixture
def one_device():
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    yield mesh


def shapes(mesh, spec=None, num_layers: int = 6, num_remove: int = 2, **changes):
  settings = dict(model='m', num_remove=num_remove, seq_len=16, batch_size=4, num_sequences=32, train_data=('text',))
  config = config_of(**settings | changes)
  return shapes_of(config, spec or tiny_spec(), num_layers, [num_remove], mesh)


@pytest.mark.parametrize('devices', [1, 4])
def test_speeds_are_measured_with_the_shapes_of_the_run(devices, eight_devices):
  mesh = sharding.make_mesh((1, devices, 1), eight_devices[:devices])
  with jax.set_mesh(mesh):
    of = shapes(mesh)
    listed = stages(of.settings, [2])
    by_stage = programs_by_stage(of, listed)
    speed = seconds_lib.measure_speed(of, [p for programs in by_stage for p in programs])
  assert '6 layers, 4 × 16 tokens' in speed.about
  assert 0 < speed.forward < 1e15 and 0 < speed.gradients < 1e15
  without = Program('p', None, (), 1.0, 0)
  with jax.set_mesh(mesh):
    assert seconds_lib.measure_speed(of, [without]).gradients is None


def test_a_large_model_is_timed_in_part(one_device):
  rows, layers = seconds_lib._affordable(shapes(one_device, LLAMA_7B, 32, 8, seq_len=1024, batch_size=16))
  assert (rows, layers) == (1, 1)
  rows, layers = seconds_lib._affordable(shapes(one_device, LLAMA_7B, 32, 8, seq_len=16, batch_size=16))
  assert rows == 16 and 1 < layers < 32


def test_stages_add_up(one_device):
  of = shapes(one_device, method=('taylor',), compare=('none',), eval_data={'a': 'b'}, eval_seq_len=16)
  listed = stages(of.settings, [2], checks_source=False)
  by_stage = programs_by_stage(of, listed)
  speed = seconds_lib.Speed(forward=1e9, gradients=5e8, about='')
  found = seconds_lib.seconds_by_stage(listed, by_stage, speed)
  assert not {'loading the model', 'writing and checking the export'} & set(found)
  assert 'choosing 2 layers by taylor' in found
  (taylor,) = next(p for s, p in zip(listed, by_stage) if s.title.startswith('choosing'))
  assert found['choosing 2 layers by taylor'] == pytest.approx(taylor.calls * taylor.model_flops / 5e8)
  (dense,) = next(p for s, p in zip(listed, by_stage) if s.title == 'measuring the dense model')
  assert found['measuring the dense model'] == pytest.approx(dense.calls * dense.model_flops / 1e9)
  text = seconds_lib.seconds_table(found, speed)
  assert 'together' in text and all(title in text for title in found)


@pytest.mark.parametrize('method', ['auto', 'ppl', 'taylor', 'cosine_block', 'sleb'])
def test_choosing_takes_longer_with_more_layers_and_more_tokens(method, one_device):
  speed = seconds_lib.Speed(1e9, 1e9, '')

  def seconds(num_layers: int, score_steps: int) -> float:
    of = shapes(one_device, num_layers=num_layers, method=(method,), score_steps=score_steps, num_sequences=256)
    listed = [s for s in stages(of.settings, [2]) if s.title.startswith('choosing')]
    return sum(seconds_lib.seconds_by_stage(listed, programs_by_stage(of, listed), speed).values())

  assert 1.5 < seconds(16, 8) / seconds(8, 8) < 4.1
  assert seconds(8, 16) / seconds(8, 8) == pytest.approx(2, rel=0.01)


def test_auto_dtype_is_what_the_device_computes_fast():
  @dataclasses.dataclass
  class Device:
    platform: str
    compute_capability: str = ''

  assert about.fast_dtype(Device('tpu')) == 'bfloat16'
  assert about.fast_dtype(Device('gpu', '8.0')) == 'bfloat16' and about.fast_dtype(Device('gpu', '7.5')) == 'float32'
  assert about.fast_dtype(Device('cpu')) in ('float32', 'bfloat16')
  assert config_of(dtype='auto').with_dtype(lambda: 'bfloat16').computation.dtype == 'bfloat16'
  assert config_of(dtype='float32').with_dtype(lambda: 'bfloat16').computation.dtype == 'float32'


def test_weights_that_are_made_up_differ(one_device):
  of = shapes(one_device)
  leaf = jax.tree.leaves(seconds_lib._made_up(of.dense).layers)[0]
  assert len(np.unique(leaf)) > leaf.size // 2


DELTA = Delta(key_heads=2, value_heads=4, key_dim=8, value_dim=4, width=3)


@pytest.mark.parametrize(
  'features',
  [
    dict(window_L=(4, 0, 4, 0, 4, 0)),
    dict(experts=4, experts_per_token=2),
    dict(delta=DELTA, mixer_L=(1, 0, 1, 1, 0, 1), attn_gate=True, qk_norm=True),
  ],
)
def test_a_part_of_any_kind_of_model_is_timed(features, one_device, monkeypatch):
  monkeypatch.setattr(seconds_lib, 'TIMED', {'cpu': 1})
  of = shapes(one_device, tiny_spec(**features))
  gradients = Program('p', None, (), 1.0, 0, gradients=1)
  speed = seconds_lib.measure_speed(of, [gradients])
  assert speed.about.startswith('1 layer, 1 × 16 tokens') and speed.gradients > 0
