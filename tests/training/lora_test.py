"""LoRA: factors and their product, training against plain formulas, merging, memory. As a script: eight devices."""

import dataclasses
import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Endless
from tiny import config_of

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.run import pipeline
from elder_jax.training import trainer
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.settings import TrainSettings
from elder_jax.training.step import combine
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask
from elder_jax.training.trainer import train

L, RANK, ALPHA = 3, 2, 6.0
SPEC = Spec(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)
# Another kind of block: biases, LayerNorm, no gate in the MLP, attention and MLP side by side.
PARALLEL = dataclasses.replace(
  SPEC,
  norm='layer',
  block='parallel',
  shared_norm=True,
  gated_mlp=False,
  activation='gelu',
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  head_bias=True,
  tied=False,
)
MATRICES = {'wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'}
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (8, 4, 9), np.int32)


@functools.cache
def random_model(spec: Spec = SPEC) -> Decoder:
  return Decoder(spec, L, jax.random.key(0))


def moved(model: Decoder) -> Decoder:
  """`model` with LoRA whose second factors are not 0 any more."""
  model = lora.attach(model, RANK, ALPHA, 0)
  for i, name in enumerate(sorted(MATRICES)):
    if (matrix := getattr(model.layers, name)) is not None:
      b = matrix.b.get_value()
      matrix.b.set_value(0.1 * jax.random.normal(jax.random.key(i), b.shape))
  return model


def leaves(model) -> dict:
  return {jax.tree_util.keystr(p): np.array(a) for p, a in jax.tree_util.tree_flatten_with_path(model)[0]}


@functools.partial(jax.jit, static_argnames='mode')
def logits(model: Decoder, mode: Mode = Mode()):
  return logits_of(model, forward(model, BATCHES_SBT[0], mode=mode)[0])


def test_factors_have_the_axes_of_their_matrix():
  made = lora.factors(random_model().layers, RANK, seed=0)
  assert set(made) == MATRICES
  axes = {name: tuple(ab[k].get_metadata()['axes'] for k in 'ab') for name, ab in made.items()}
  assert axes['wq'] == ('LDr', 'LrNH') and axes['wk'] == axes['wv'] == ('LDr', 'LrKH')
  assert axes['wo'] == ('LNHr', 'LrD') and axes['w_down'] == ('LFr', 'LrD')
  assert axes['w_gate'] == axes['w_up'] == ('LDr', 'LrF')
  sizes = SPEC.sizes(L) | {'r': RANK}
  for ab in made.values():
    for param in ab.values():
      assert param.get_value().shape == tuple(sizes[x] for x in param.get_metadata()['axes'])
      assert param.get_value().dtype == jnp.float32
    assert not ab['b'].get_value().any()

  def a(seed, name):
    return np.array(lora.factors(random_model().layers, 16, seed)[name]['a'].get_value())

  np.testing.assert_allclose(a(0, 'w_down').std(), 24**-0.5, rtol=0.1)
  np.testing.assert_allclose(a(0, 'wo').std(), 16**-0.5, rtol=0.1)
  assert np.array_equal(a(0, 'wq'), a(0, 'wq')) and not np.isclose(a(0, 'wq'), a(1, 'wq')).any()
  assert not np.isclose(a(0, 'w_gate'), a(0, 'w_up')).any()


def test_training_starts_at_the_base():
  chex.assert_trees_all_close(logits(lora.attach(random_model(), RANK, ALPHA, 0)), logits(random_model()), atol=1e-6)


@pytest.mark.parametrize('spec', [SPEC, PARALLEL], ids=['llama', 'parallel'])
def test_merged_is_unmerged(spec):
  model = moved(random_model(spec))
  merged = lora.merge(model)
  assert jax.tree.structure(merged) == jax.tree.structure(random_model(spec))
  before, after = np.asarray(logits(model)), np.asarray(logits(merged))
  np.testing.assert_allclose(after, before, atol=1e-5)
  assert np.abs(after - np.asarray(logits(random_model(spec)))).max() > 0.1
  old, new, factor = leaves(random_model(spec)), leaves(merged), leaves(model)
  for name in old:
    short = name.removeprefix('.layers.').removesuffix('.value')
    if short not in MATRICES:
      np.testing.assert_array_equal(new[name], old[name])
      continue
    a, b = (factor[f'.layers.{short}.{k}.value'].astype(np.float64) for k in 'ab')
    change_LIO = np.matmul(a.reshape(L, -1, RANK), b.reshape(L, RANK, -1))
    np.testing.assert_allclose(new[name], old[name] + ALPHA / RANK * change_LIO.reshape(old[name].shape), atol=1e-6)


@pytest.mark.parametrize('equation', ['BTD,DNH->BTNH', 'BTNH,NHD->BTD', 'BTD,DF->BTF', 'BTF,FD->BTD'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_of_a_product_is_that_of_the_formula(equation, dtype):
  sizes = {'B': 2, 'T': 5, 'D': 8, 'N': 2, 'H': 3, 'F': 7, 'r': 2}
  x_axes, w_axes, y_axes = equation.replace('->', ',').split(',')
  outer = y_axes[2:]
  inner = x_axes[2:]
  keys = iter(jax.random.split(jax.random.key(0), 5))

  def make(axes):
    return jax.random.normal(next(keys), [sizes[s] for s in axes])

  x, w = make(x_axes).astype(dtype), make(w_axes).astype(dtype)
  a, b, dy = make(inner + 'r'), make('r' + outer), make(y_axes)

  def plain(x, a, b):
    change = jnp.einsum(f'{inner}r,r{outer}->{w_axes}', a, b)
    return jnp.sum(dy * jnp.einsum(equation, x.astype(jnp.float32), w.astype(jnp.float32) + 0.5 * change))

  def mine(x, a, b):
    return jnp.sum(dy * lora.product(equation, 0.5, x, w, a, b))

  tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == 'float32' else dict(rtol=0.03, atol=0.15)
  x32 = x.astype(jnp.float32)
  np.testing.assert_allclose(mine(x, a, b), plain(x32, a, b), rtol=1e-5 if dtype == 'float32' else 0.02)
  for got, wanted, like in zip(jax.grad(mine, (0, 1, 2))(x, a, b), jax.grad(plain, (0, 1, 2))(x32, a, b), (x, a, b)):
    assert got.dtype == like.dtype and np.abs(wanted).max() > 1
    np.testing.assert_allclose(np.float32(got), wanted, **tolerance)
  assert not np.any(jax.grad(lambda w: jnp.sum(lora.product(equation, 0.5, x, w, a, b)))(w))  # frozen


def fit(model, layers=(), mode=Mode(), log=lambda i, m: None, checkpoint=None, batch=None, teacher=None, **more):
  settings = TrainSettings(
    **({'steps': 3, 'lr': 1e-2, 'lambda2': 0.5, 'order': 'joint', 'lora_rank': RANK, 'lora_alpha': ALPHA} | more)
  )
  batch = batch or (lambda i: BATCHES_SBT[i % 8])
  return train(model, list(layers), settings, mode, Endless(batch), log, checkpoint, teacher)


@functools.cache
def fitted() -> tuple[dict, list]:
  losses = []
  return leaves(fit(random_model(), log=lambda i, m: losses.append(m['loss']))), losses


def test_training_is_the_formula():
  model, steps = random_model(), 3
  factors = {
    name: {k: p.get_value() for k, p in ab.items()} for name, ab in lora.factors(model.layers, RANK, 0).items()
  }

  def with_factors(factors):
    changed = jax.tree.map(lambda a: a, model)
    for name, ab in factors.items():
      w = getattr(model.layers, name).get_value()
      change_LIO = jnp.matmul(ab['a'].reshape(L, -1, RANK), ab['b'].reshape(L, RANK, -1), precision='highest')
      getattr(changed.layers, name).set_value(w + ALPHA / RANK * change_LIO.reshape(w.shape))
    return changed

  def lm_loss(factors, tokens_BT):
    changed = with_factors(factors)
    logp_BTV = jax.nn.log_softmax(logits_of(changed, forward(changed, tokens_BT)[0])[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate(1e-2, steps, 0.05)))
  state = tx.init(factors)

  @jax.jit
  def step(factors, state, tokens_BT):
    updates, state = tx.update(jax.grad(lm_loss)(factors, tokens_BT), state)
    return optax.apply_updates(factors, updates), state

  for i in range(steps):
    factors, state = step(factors, state, BATCHES_SBT[i])
  expected = leaves(with_factors(factors))
  after, before = fitted()[0], leaves(model)
  chex.assert_trees_all_close(after, expected, atol=1e-5)
  changed = {name for name in before if np.abs(before[name] - after[name]).max() > 1e-3}
  assert changed == {f'.layers.{name}.value' for name in MATRICES}


@pytest.mark.parametrize(
  'mode, more',
  [
    (Mode(remat='dots'), {}),
    (Mode(remat='dots_no_batch'), {}),
    (Mode(remat='full'), {'grad_accum': 2}),
  ],
)
def test_remat_and_accumulation_change_nothing(mode, more):
  chex.assert_trees_all_close(leaves(fit(random_model(), mode=mode, **more)), fitted()[0], atol=1e-5)


def test_rank_zero_is_training_without():
  model = random_model()
  settings = TrainSettings(steps=1, lr=1e-2, lambda2=0.5, order='joint')

  def run(s):
    return leaves(train(model, [1], s, Mode(), Endless(lambda i: BATCHES_SBT[i])))

  plain, zero = run(settings), run(dataclasses.replace(settings, lora_rank=0, seed=3))
  chex.assert_trees_all_equal(zero, plain)
  assert {n for n in plain if 'norm' in n and '.layers.' in n and (plain[n] != leaves(model)[n]).any()}


def test_the_frozen_base_is_a_teacher():
  log, teacher, cut = [], random_model(), pruning.prune(random_model(), [1])
  fit(cut, log=lambda i, m: log.append(m), steps=25, distill=1.0, teacher=teacher, batch=lambda i: BATCHES_SBT[0])
  assert log[-1]['kl'] < 0.7 * log[0]['kl'], (log[0]['kl'], log[-1]['kl'])


def test_bfloat16_base_and_float32_factors(monkeypatch):
  states = []
  init = init_state
  monkeypatch.setattr(trainer, 'init_state', lambda *args: states.append(init(*args)) or states[-1])
  half = jax.tree_util.tree_map_with_path(
    lambda p, a: a if 'gate_L' in jax.tree_util.keystr(p) else a.astype(jnp.bfloat16), random_model()
  )
  log = []
  result = fit(half, mode=Mode(dtype='bfloat16'), log=lambda i, m: log.append(m), moment_dtype='bfloat16')
  state, frozen = states[0]
  assert {a.dtype for a in jax.tree.leaves(state.trained)} == {jnp.dtype('float32')}
  assert frozen.layers.wq.base.get_value().dtype == jnp.bfloat16 and frozen.layers.wq.a.get_value() is None
  assert {a.dtype for a in jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, 'mu'))} == {jnp.dtype('bfloat16')}
  assert result.layers.wq.get_value().dtype == jnp.float32 and result.embed.get_value().dtype == jnp.bfloat16
  np.testing.assert_allclose([m['loss'] for m in log], fitted()[1], rtol=0.02)


@pytest.mark.slow
def test_a_killed_sequential_training_goes_on_exactly(tmp_path):
  options = dict(steps=6, order='sequential', lambda2_power=1.0, optimizer='lion', moment_dtype='bfloat16', lr=1e-3)
  straight = fit(random_model(), [2, 1], **options)

  class Killed(BaseException):
    pass

  def dying(i):
    if i == 5:
      raise Killed
    return BATCHES_SBT[i]

  def checkpoints():
    return Checkpoints(tmp_path / 'c', 2, 6)

  with pytest.raises(Killed):
    fit(random_model(), [2, 1], checkpoint=checkpoints(), batch=dying, **options)
  steps = []
  resumed = fit(random_model(), [2, 1], log=lambda i, m: steps.append(i), checkpoint=checkpoints(), **options)
  assert steps == [4, 5]
  chex.assert_trees_all_equal(leaves(resumed), leaves(straight))
  assert np.abs(leaves(straight)['.layers.wq.value'] - leaves(random_model())['.layers.wq.value']).max() > 1e-3


def test_rank_above_the_smallest_side_is_refused():
  abstract = jax.eval_shape(random_model)
  lora.check(abstract, 8)  # wk makes K·H = 8
  with pytest.raises(InputError, match='^lora_rank=9: .* is 8; give at most that'):
    lora.check(abstract, 9)


@pytest.mark.slow
def test_whole_runs(settings):
  """Penalty, annealing, closed form and distillation with LoRA, through to an export that is read back."""
  settings |= dict(lora_rank=4, compare=['absorb_then_train'], distill=0.25, remat='full', lr=1e-2)
  report = pipeline.run(config_of(**settings))
  assert [row['recipe'] for row in report['rows']] == ['absorb_then_train', 'regularize']
  work = pathlib.Path(settings['workdir'])
  dense, pruned = (open_source(str(f), work / 'x') for f in (settings['model'], work / 'export'))
  tensors = [dict(_tensors(source)) for source in (dense, pruned)]
  kept = {str(new): str(old) for new, old in enumerate(report['kept'])}
  changed, same = set(), set()
  for name, after in tensors[1].items():
    parts = name.split('.')
    old = '.'.join([*parts[:2], kept[parts[2]], *parts[3:]]) if 'layers' in parts else name
    (same if np.array_equal(tensors[0][old], after) else changed).add(name)
  assert len(changed) == 7 * len(kept) and all('_proj' in name for name in changed)
  assert len(same) == len(tensors[1]) - len(changed) and any('norm' in name for name in same)


def _tensors(source):
  import safetensors.numpy

  return safetensors.numpy.load_file(source.files / 'model.safetensors')


# ---- memory ----


def memory(num_layers: int, rank: int, remat: str):
  """The compiled step's memory_analysis on a model of 16 times more weights than activations, nothing allocated."""
  spec = dataclasses.replace(SPEC, d_model=128, head_dim=32, num_kv_heads=4, d_ff=384, rope_freq_RH=((1.0,) * 16,))
  model = jax.eval_shape(lambda: Decoder(spec, num_layers, jax.random.key(0)))
  if rank:
    model = lora.wrap(model, jax.eval_shape(lambda: lora.factors(model.layers, rank, 0)), 2.0)
  mask, rate = train_mask(model, 'lora' if rank else 'blocks'), learning_rate(1e-3, 10, 0.0)
  tx = make_optimizer(mask, rate, 0.0, 1.0)
  state, frozen = jax.eval_shape(lambda m: init_state(m, mask, tx), model)
  terms = {
    'alive_L': np.ones(num_layers, bool),
    'gate_weight_L': np.zeros(num_layers, np.float32),
    'delta_weight_L': np.zeros(num_layers, np.float32),
  }
  step = make_step(tx, Mode(remat=remat), 1, rate)
  return step.lower(state, (frozen, None), np.zeros((1, 16), np.int32), terms).compile().memory_analysis()


def per_layer(rank: int, remat: str) -> tuple[float, float]:
  """(bytes of weights and optimiser state, temporary bytes) that one layer more costs."""
  few, more = (memory(n, rank, remat) for n in (2, 6))

  def slope(name):
    return (getattr(more, name) - getattr(few, name)) / 4

  return slope('argument_size_in_bytes'), slope('temp_size_in_bytes')


MATRIX_BYTES = 4 * (4 * 128 * 128 + 3 * 128 * 384)  # of a layer


@pytest.mark.usefixtures('whole_compiler')
def test_memory_of_full_training_holds_a_gradient_for_each_weight():
  arguments, temporary = per_layer(0, 'full')
  assert arguments > 3 * MATRIX_BYTES  # weights and two moments
  assert temporary > MATRIX_BYTES


@pytest.mark.usefixtures('whole_compiler')
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_memory_of_lora_holds_neither_gradients_nor_merged_weights_of_all_layers(remat):
  arguments, temporary = per_layer(2, remat)
  factors = 4 * 2 * (4 * (128 + 128) + 3 * (128 + 384))
  assert arguments < MATRIX_BYTES + 3 * factors + 2000  # norms, gates
  assert temporary < MATRIX_BYTES / 4, (temporary, MATRIX_BYTES)


# ---- eight devices ----

WIDE = dataclasses.replace(SPEC, d_model=128, d_ff=128, vocab_size=48)  # adafactor factors what has two axes of 128


COMPILED: list[str] = []  # jax's own events
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **more: COMPILED.append(event) if 'backend_compile' in event else None
)


def trained_on(sizes: tuple[int, ...], kind: str, rank: int) -> dict:
  """Two steps on a mesh: losses, how factors and moments lie, compilations."""
  whole = Decoder(WIDE, 2, jax.random.key(0))
  batches = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 8, 9), np.int32)
  terms = {
    'alive_L': np.ones(2, bool),
    'gate_weight_L': np.zeros(2, np.float32),
    'delta_weight_L': np.zeros(2, np.float32),
  }
  mesh = sharding.make_mesh(sizes, jax.devices()[: 1 if sizes == (1, 1, 1) else 8])
  with jax.set_mesh(mesh):
    model = jax.tree.map(jax.device_put, whole, sharding.for_model(whole, mesh, sizes))
    model = lora.attach(model, rank, 4.0, 0) if rank else model
    mask, rate = train_mask(model, 'lora' if rank else 'blocks'), learning_rate(1e-2, 2, 0.0)
    tx = make_optimizer(mask, rate, 0.0, 1.0, kind)
    step, (state, frozen) = make_step(tx, Mode(), 1, rate), init_state(model, mask, tx)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    lies = {jax.tree_util.keystr(p): [[*a.shape], [*a.sharding.shard_shape(a.shape)]] for p, a in leaves}
    losses = []
    for batch in (sharding.put_batch(b, mesh) for b in batches):
      COMPILED.clear()
      state, metrics = step(state, (frozen, None), batch, terms)
      again = len(COMPILED)  # of the second step, in the end
      losses.append(float(metrics['loss']))
    facts = {'losses': losses, 'again': again, 'lies': lies}
    if rank:
      merged, before = lora.merge(combine(state.trained, frozen)), model.layers.wq.base.get_value()
      wq = merged.layers.wq.get_value()
      assert wq.sharding == before.sharding
      facts['moved'] = np.asarray(wq - before).ravel()
    return facts


@pytest.mark.slow
def test_eight_devices_train_as_one_does(eight_devices):
  facts = {
    f'{",".join(map(str, sizes))} {kind}': trained_on(sizes, kind, rank)
    for sizes in ((1, 1, 1), (2, 2, 2))
    for kind, rank in (('adamw', 2), ('adafactor', 0))
  }
  for kind in ('adamw', 'adafactor'):
    one, eight = facts[f'1,1,1 {kind}'], facts[f'2,2,2 {kind}']
    np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-5)
    assert one['losses'][1] != one['losses'][0] and one['again'] == eight['again'] == 0
  np.testing.assert_allclose(facts['2,2,2 adamw']['moved'], facts['1,1,1 adamw']['moved'], atol=1e-5)
  assert np.abs(facts['1,1,1 adamw']['moved']).max() > 1e-3
  ways = {'wq.a': 2, 'wq.b': 2, 'wo.a': 2, 'wo.b': 2, 'w_up.a': 2, 'w_down.b': 2}  # D over fsdp, N and F over tp
  for name, (shape, shard) in facts['2,2,2 adamw']['lies'].items():
    for part, n in ways.items():
      if f'.{part}.value' in name:
        assert np.prod(shape) == n * np.prod(shard), (name, shape, shard)
  lies = facts['2,2,2 adafactor']['lies']
  rows = [name for name in lies if '.v_row.layers.w_up' in name]
  assert len(rows) == 1 and lies[rows[0]] == [[2, 128], [2, 128]]
