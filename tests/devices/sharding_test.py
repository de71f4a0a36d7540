"""Meshes, and that training is the same on each of them, on eight simulated devices."""

import functools
import os
import pathlib

import jax
import numpy as np
import pytest
from tiny import slow

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.text.generation import generate
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask

SPEC = Spec(
  vocab_size=48,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)
L = 3
# Mesh -> remat and grad_accum, which do not change any result.
MESHES = {
  '1,1,1': ('none', 2),
  '8,1,1': ('none', 2),
  '4,2,1': ('dots', 2),
  '2,4,1': ('full', 2),
  '1,8,1': ('none', 1),
  '2,2,2': ('none', 2),
}
QUICK = ('1,1,1', '1,8,1', '2,2,2')  # make test runs these
FLAGS = [flag if flag in QUICK else slow(flag) for flag in MESHES]
CUT = [flag for flag in FLAGS if flag not in ('1,1,1', slow('8,1,1'))]


def named(tree) -> dict:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def sizes_of(flag: str) -> tuple[int, ...]:
  return tuple(int(size) for size in flag.split(','))


def lies(state) -> dict:
  """{leaf: (shape, shape of a device's shard)}."""
  return {k: [[*a.shape], [*a.sharding.shard_shape(a.shape)]] for k, a in named(state).items()}


COMPILED: list[str] = []  # events that JAX reports
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **more: COMPILED.append(event) if 'backend_compile' in event else None
)


def trained_on(flag: str, folder: pathlib.Path) -> tuple[dict, dict]:
  """Trains two steps on a mesh, and resumes after the first. Returns (losses, shardings and other facts; arrays)."""
  remat, grad_accum = MESHES[flag]
  whole = Decoder(SPEC, L, jax.random.key(0))
  batches = np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 16, 9), np.int32)
  terms = {
    'alive_L': np.ones(L, bool),
    'gate_weight_L': np.zeros(L, np.float32),
    'delta_weight_L': np.float32([0, 0.1, 0]),
  }
  mesh = sharding.make_mesh(sizes_of(flag), jax.devices()[: 1 if flag == '1,1,1' else 8])
  with jax.set_mesh(mesh):
    model = jax.tree.map(jax.device_put, whole, sharding.for_model(whole, mesh, sizes_of(flag)))
    mask, rate = train_mask(model, 'all'), learning_rate(1e-3, 2, 0.0)
    tx = make_optimizer(mask, rate, 0.0, 1.0)
    step = make_step(tx, Mode(remat=remat), grad_accum, rate)
    state, frozen = init_state(model, mask, tx)
    before, losses, arrays = lies(state), [], {}
    whole_stacks = {str(list(a.shape)).replace(' ', '') for a in jax.tree.leaves(model.layers) if a.ndim > 2}
    checkpoints = Checkpoints(folder / flag, 1, 2)
    for i, batch in enumerate([sharding.put_batch(b, mesh) for b in batches]):
      COMPILED.clear()
      state, metrics = step(state, (frozen, None), batch, terms)
      again = len(COMPILED)  # after the loop, of the second step
      losses.append(float(metrics['loss']))
      if not i:
        checkpoints.save(state)
        checkpoints.wait()
        arrays |= {f'gradient{k}': np.asarray(a) for k, a in named(state.opt_state).items() if '.mu.' in k}
        program = step.lower(state, (frozen, None), batch, terms).compile().as_text()
    restored = checkpoints.latest(init_state(model, mask, tx)[0])
    resumed, _ = step(restored, (frozen, None), batch, terms)
    facts = {
      'losses': losses,
      'before': before,
      'after': lies(state),
      'again': again,
      'replicated': all(m.is_fully_replicated for m in metrics.values()),
      'stacks': len(whole_stacks),
      'whole_stacks': [s for s in whole_stacks if s in program],
      'gathers': program.count(' all-gather('),
      'batch': [*batch.sharding.shard_shape((16, 9))],
      'resumed': all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(state))),
    }
    if flag in ('1,1,1', '2,2,2'):  # fewer prompts than devices
      facts['written'] = generate(
        model, [[1, 2, 3], [4], [5, 6]], 5, put=functools.partial(sharding.put_batch, mesh=mesh)
      )
    return facts, arrays | {k: np.asarray(a) for k, a in named(state.trained).items()}


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  facts, arrays = {}, {f'start/{k}': np.asarray(a) for k, a in named(Decoder(SPEC, L, jax.random.key(0))).items()}
  for flag in QUICK if os.environ['ELDER_JAX_QUICK'] == '1' else MESHES:
    facts[flag], found = trained_on(flag, tmp_path_factory.mktemp('mesh'))
    arrays |= {f'{flag}/{k}': a for k, a in found.items()}
  return facts, arrays


@pytest.mark.parametrize('flag', FLAGS[1:])
def test_every_mesh_trains_like_one_device(result, flag):
  facts, arrays = result
  np.testing.assert_allclose(facts[flag]['losses'], facts['1,1,1']['losses'], rtol=1e-5)
  names = [k.partition('/')[2] for k in arrays if k.startswith('1,1,1/')]
  assert len(names) == 22
  for name in names:
    one, many = arrays[f'1,1,1/{name}'], arrays[f'{flag}/{name}']
    # The first value of a mean is the gradient, times 0.1 and the clipping factor.
    np.testing.assert_allclose(many, one, atol=1e-5 * min(1, np.abs(one).max()), err_msg=name)
    assert np.abs(many - arrays.get(f'start/{name}', 0)).max() > 1e-4, name


@pytest.mark.parametrize('flag', FLAGS)
def test_weights_and_optimiser_state_are_sharded_and_stay_so(result, flag):
  facts, _ = result
  _, fsdp, tp = (int(s) for s in flag.split(','))
  for when in ('before', 'after'):
    lies = facts[flag][when]
    matrices = [k for k in lies if '.w_up.' in k or '.embed.' in k or '.wo.' in k or '.wk.' in k]
    assert len(matrices) == 12  # weight, mu and nu of each
    for name in matrices:
      shape, shard = lies[name]
      assert np.prod(shape) == np.prod(shard) * fsdp * tp, (when, name, shape, shard)
    norms = [k for k in lies if 'norm' in k]
    assert len(norms) == 9
    for name in norms:
      shape, shard = lies[name]
      assert np.prod(shape) == np.prod(shard) * fsdp, (when, name, shape, shard)


@pytest.mark.parametrize('flag', CUT)
def test_no_device_holds_a_whole_stack(result, flag):
  """The compiled step has no whole stack of weights, gradients, moments, or residuals of the backward pass."""
  facts = result[0][flag]
  assert facts['stacks'] == 5 and facts['whole_stacks'] == []  # of wq, wk and wv, wo, w_gate and w_up, w_down
  assert facts['gathers'] > 0 and set(result[0]['1,1,1']['whole_stacks']) and not result[0]['1,1,1']['gathers']


@pytest.mark.parametrize('flag', FLAGS)
def test_metrics_are_replicated(result, flag):
  assert result[0][flag]['replicated']


def test_generation_on_a_mesh_equals_one_device(result):
  facts, _ = result
  assert [len(tokens) for tokens in facts['2,2,2']['written']] == [5, 5, 5]
  assert facts['2,2,2']['written'] == facts['1,1,1']['written']


@pytest.mark.parametrize('flag', FLAGS)
def test_the_batch_is_sharded_over_data_and_fsdp(result, flag):
  data, fsdp, _ = (int(s) for s in flag.split(','))
  assert result[0][flag]['batch'] == [16 // (data * fsdp), 9]


@pytest.mark.parametrize('flag', FLAGS)
def test_one_compilation_serves_all_steps(result, flag):
  assert result[0][flag]['again'] == 0


@pytest.mark.parametrize('flag', FLAGS)
def test_training_resumes_from_a_checkpoint_of_a_mesh(result, flag):
  assert result[0][flag]['resumed']


@pytest.mark.parametrize(
  'flag, sizes',
  [('1,8,1', (1, 8, 1)), ('-1,1,1', (8, 1, 1)), ('2,-1,2', (2, 2, 2)), ('1,4,-1', (1, 4, 2)), ('8,1,-1', (8, 1, 1))],
)
def test_make_mesh(flag, sizes):
  mesh = sharding.make_mesh(sizes_of(flag), np.arange(8))
  assert dict(mesh.shape) == dict(zip(('data', 'fsdp', 'tp'), sizes))


@pytest.mark.parametrize(
  'sizes', [(), (8,), (1, 8), (1, 8, 1, 1), (-1, -1, 1), (0, 8, 1), (-2, 4, 1), (2, 2, 1), (3, -1, 1), (16, -1, 1)]
)
def test_make_mesh_refuses(sizes):
  with pytest.raises(InputError) as caught:
    sharding.make_mesh(sizes, np.arange(8))
  assert caught.value.for_command().startswith(f'--mesh={",".join(map(str, sizes))}: ')


def one_device_as(**sizes):
  """A stand-in for a mesh; only its sizes are read before anything is placed."""
  return type('FakeMesh', (), {'shape': {'data': 1, 'fsdp': 1, 'tp': 1} | sizes})()


@pytest.mark.parametrize(
  'sizes, axis, size',
  [({'fsdp': 3}, 'fsdp=3', '16 .*: 2 and 4'), ({'tp': 5}, 'tp=5', '48 .*: 2'), ({'tp': 4}, 'tp=4', '2 .*: 2')],
)
def test_a_size_that_does_not_divide_is_refused(sizes, axis, size, monkeypatch):
  monkeypatch.setattr(sharding, 'NamedSharding', lambda mesh, spec: spec)
  model = jax.eval_shape(lambda: Decoder(SPEC, L, jax.random.key(0)))
  with pytest.raises(InputError, match=rf'^mesh=1,2,3: {axis} does not divide a size of {size}\.$'):
    sharding.for_model(model, one_device_as(**sizes), (1, 2, 3))


def test_a_batch_that_does_not_divide_is_refused():
  mesh = one_device_as(data=2, fsdp=4)
  sharding.check_batch(mesh, (2, 4, 1), 16, '--batch_size')
  with pytest.raises(InputError, match='^mesh=2,4,1: .*8.*--batch_size=12; .*: 8 and 16.$'):
    sharding.check_batch(mesh, (2, 4, 1), 12, '--batch_size')
  with pytest.raises(InputError, match='batch_size=3; .*: 8.$'):
    sharding.check_batch(mesh, (2, 4, 1), 3, '--batch_size')


def test_constraints_do_nothing_without_a_mesh():
  model, x = Decoder(SPEC, L, jax.random.key(0)), np.ones((4, 2))
  for held, a in (
    (sharding.constrain(x, 'fsdp', 'tp'), x),
    (sharding.constrain_batch(x), x),
    (sharding.gather(x, 'LDF'), x),
    (sharding.replicate(x), x),
    (sharding.constrain_state(model), model),
  ):
    assert held is a
  assert sharding.batch_ways() == 1 and sharding.platform() == jax.default_backend()
