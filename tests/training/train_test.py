"""The training loop: what trains, the optimiser, donation, the schedule, non-finite losses, checkpoints."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.loop import NonFiniteLoss
from elder_jax.training.loop import run_steps
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import TrainState
from elder_jax.training.step import combine
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import partition
from elder_jax.training.step import train_mask

SPEC = Spec(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=False,
  rope_freq_RH=((1.0, 0.1),),
)
L = 3
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (8, 4, 9), np.int32)
NORMS = {'.final_norm.scale.value', '.layers.attn_norm.scale.value', '.layers.mlp_norm.scale.value'}
TRACES = []


def named(tree) -> dict:
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def trains(name: str, what: str) -> bool:
  return {'gates': 'gate_L' in name, 'blocks': '.layers.' in name, 'all': 'gate_L' not in name}[what]


def copy(tree) -> dict:
  return {name: np.array(leaf) for name, leaf in named(tree).items()}


def rate(step):
  TRACES.append(step)  # the one part of a step that a test can see run when it is traced
  return 0.01 + 0.0 * step


@functools.cache
def random_model() -> Decoder:
  return Decoder(SPEC, L, jax.random.key(0))


def tiny(dtype=jnp.float32) -> Decoder:
  def to_dtype(path, a):
    return a if 'gate_L' in jax.tree_util.keystr(path) else a.astype(dtype)

  return jax.tree_util.tree_map_with_path(to_dtype, random_model())


def terms(**more) -> dict:
  return {
    'alive_L': np.ones(L, bool),
    'gate_weight_L': np.full(L, 0.01, np.float32),
    'delta_weight_L': np.full(L, 0.1, np.float32),
  } | more


@functools.cache
def adam_step(what: str, dtype: str = 'float32'):
  """(tx, step); compiled once for all tests."""
  tx = make_optimizer(train_mask(tiny(), what), rate, 0.0, 1.0)
  return tx, make_step(tx, Mode(dtype=dtype), 1, rate)


def begin(what: str, model: Decoder | None = None, dtype: str = 'float32'):
  model = tiny() if model is None else model
  tx, step = adam_step(what, dtype)
  return step, *init_state(model, train_mask(model, what), tx)


@pytest.mark.parametrize('what', ['gates', 'blocks', 'all'])
def test_nothing_but_what_is_named_trains(what):
  before = copy(tiny())
  step, state, frozen = begin(what)
  assert set(named(state.trained)) == {name for name in before if trains(name, what)}
  assert set(named(frozen)) == {name for name in before if not trains(name, what)}
  state, _ = step(state, (frozen, None), BATCHES_SBT[0], terms())
  assert int(state.step) == 1
  after = copy(combine(state.trained, frozen))
  assert list(after) == list(before)  # the order too: it is the tree's
  for name in before:
    assert np.array_equal(after[name], before[name]) != trains(name, what), name
  assert set(named(state.trained)) == {name for name in before if trains(name, what)}


@pytest.mark.parametrize('what', ['gates', 'blocks', 'all'])
def test_optimiser_state_is_of_the_trained_leaves_only(what):
  _, state, _ = begin(what)
  shapes = sorted(a.shape for a in jax.tree.leaves(state.opt_state) if a.ndim)
  assert shapes == sorted(2 * [a.shape for name, a in copy(tiny()).items() if trains(name, what)])


def test_gradient_accumulation_changes_nothing():
  model = tiny()
  mask = train_mask(model, 'all')
  tx = optax.masked(optax.sgd(0.5), mask)  # an update that is the gradient; Adam's hides a wrong scale
  results = []
  for parts in (1, 2, 4):
    state, frozen = init_state(model, mask, tx)
    state, metrics = make_step(tx, Mode(), parts, rate)(state, (frozen, None), BATCHES_SBT[0], terms())
    results.append((copy(state.trained), jax.device_get(metrics)))
  moved = max(np.abs(a - b).max() for a, b in zip(results[0][0].values(), copy(partition(model, mask)[0]).values()))
  assert moved > 1e-2
  chex.assert_trees_all_close(results[0], results[1], atol=1e-6, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[2], atol=1e-6, rtol=1e-5)


def test_masters_of_a_bfloat16_model_are_float32():
  model = tiny(jnp.bfloat16)
  step, state, frozen = begin('blocks', model, 'bfloat16')
  state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms())
  assert {a.dtype for a in jax.tree.leaves(state.trained)} == {jnp.dtype('float32')}
  assert {a.dtype for a in jax.tree.leaves(state.opt_state) if a.ndim} == {jnp.dtype('float32')}
  assert frozen.embed.get_value().dtype == jnp.bfloat16 and frozen.gate_L.get_value().dtype == jnp.float32
  assert metrics['loss'].dtype == jnp.float32 and metrics['delta_L'].dtype == jnp.float32
  # Steps that bfloat16 cannot hold: a weight of 1 would swallow one of 0.01·0.01.
  norm = np.asarray(state.trained.layers.attn_norm.scale.get_value())
  assert (norm != norm.astype(jnp.bfloat16).astype(np.float32)).any()
  _, gates, _ = begin('gates', model, 'bfloat16')
  assert gates.trained.gate_L.get_value().dtype == jnp.float32


def test_the_callers_model_outlives_donation():
  model = tiny()
  before = copy(model)
  step, state, frozen = begin('blocks', model)
  given = state.trained.layers.wq.get_value()
  state, _ = step(state, (frozen, None), BATCHES_SBT[0], terms())
  state, _ = step(state, (frozen, None), BATCHES_SBT[1], terms())
  assert given.is_deleted()  # the state was donated
  chex.assert_trees_all_equal(copy(model), before)


def test_changed_terms_do_not_recompile():
  step, state, frozen = begin('blocks')
  losses = []
  for i, change in enumerate(
    (
      {},
      {'alive_L': np.array([True, False, True])},
      {'delta_weight_L': np.zeros(L, np.float32)},
      {'gate_weight_L': np.ones(L, np.float32)},
    )
  ):
    state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms(**change))
    losses.append(float(metrics['loss']))
    if not i:
      first = len(TRACES)
  assert len(TRACES) == first > 0 and step._cache_size() == 1
  assert len(set(losses)) == 4


def test_schedule():
  r = learning_rate(2.0, 100, 0.1)
  rates = np.array([float(r(i)) for i in range(100)])
  np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
  assert rates.max() == rates[9] == rates[10] == 2.0 and rates[0] > 0
  np.testing.assert_allclose(rates[10:], 2.0 * np.arange(90, 0, -1) / 90, rtol=1e-6)
  assert float(r(100)) == 0 and 0 < rates[-1] < 0.03


@pytest.mark.parametrize('warmup', [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize('steps', [1, 2, 3, 10])
def test_schedule_wastes_no_step(steps, warmup):
  r = learning_rate(1.0, steps, warmup)
  rates = [float(r(i)) for i in range(steps)]
  assert min(rates) > 0 and max(rates) == 1.0
  if not warmup:
    assert rates[0] == 1.0


@pytest.mark.parametrize(
  'schedule, final, expected',
  [
    ('linear', 0.25, [0.5, 1, 1, 0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375]),
    ('linear', 1.0, [0.5, *9 * [1]]),
    ('cosine', 0.0, [0.5, 1, *((1 + np.cos(np.pi * i / 8)) / 2 for i in range(8))]),
    ('cosine', 0.1, [0.5, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * i / 8)) for i in range(8))]),
    ('wsd', 0.0, [0.5, *6 * [1], 1, 2 / 3, 1 / 3]),
    ('wsd', 0.4, [0.5, *6 * [1], 1, 0.8, 0.6]),
  ],
)
def test_schedules(schedule, final, expected):
  r = learning_rate(2.0, 10, 0.2, schedule, final, decay_ratio=0.3)
  rates = [float(r(i)) for i in range(11)]
  np.testing.assert_allclose(rates[:10], 2 * np.array(expected), rtol=1e-6)
  np.testing.assert_allclose(rates[10], 2 * final, atol=1e-7)


@pytest.mark.parametrize('schedule', ['cosine', 'wsd'])
@pytest.mark.parametrize('steps, warmup, decay', [(1, 0.0, 1.0), (2, 0.5, 0.5), (10, 0.0, 0.0), (10, 0.6, 0.9)])
def test_no_schedule_wastes_a_step_or_misses_the_peak(schedule, steps, warmup, decay):
  r = learning_rate(1.0, steps, warmup, schedule, 0.0, decay)
  rates = [float(r(i)) for i in range(steps)]
  assert min(rates) > 0 and max(rates) == 1.0


def test_a_long_cosine_is_above_0_to_the_end():
  r = learning_rate(1.0, 10**5, 0.0, 'cosine')
  np.testing.assert_allclose(float(r(10**5 - 1)), np.sin(np.pi / 2 / 10**5) ** 2, rtol=1e-4)


WEIGHT_BT = np.random.default_rng(3).integers(0, 2, (4, 9)).astype(np.float32)
WEIGHT_BT[1] = 0  # a part of a batch in which no token counts
WEIGHT_BT[2, :4] = 0.25


@pytest.mark.parametrize('taught', [False, True])
def test_gradient_accumulation_changes_nothing_where_tokens_are_weighted(taught):
  """Parts with few tokens that count weigh less: the mean is over the tokens of the whole batch."""
  model, mask = tiny(), train_mask(tiny(), 'all')
  tx = optax.masked(optax.sgd(0.5), mask)
  now, teacher = terms(weight_BT=WEIGHT_BT), None
  if taught:
    now |= {'distill': np.float32(0.4), 'hidden': np.float32(0.5), 'kept_L': np.array([0, 1, 2], np.int32)}
    teacher = Decoder(SPEC, L, jax.random.key(7))
  results = []
  for parts in (1, 2, 4):
    state, frozen = init_state(model, mask, tx)
    state, metrics = make_step(tx, Mode(), parts, rate)(state, (frozen, teacher), BATCHES_SBT[0], now)
    results.append((copy(state.trained), jax.device_get(metrics)))
  nll_BT = -jax.nn.log_softmax(logits_of(model, forward(model, BATCHES_SBT[0])[0]))
  nll_BT = np.take_along_axis(np.asarray(nll_BT)[:, :-1], BATCHES_SBT[0][:, 1:, None], -1)[..., 0]
  expected = np.sum(nll_BT * WEIGHT_BT[:, :-1]) / np.sum(WEIGHT_BT[:, :-1])
  np.testing.assert_allclose(results[0][1]['lm_loss'], expected, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[1], atol=1e-6, rtol=1e-5)
  chex.assert_trees_all_close(results[0], results[2], atol=1e-6, rtol=1e-5)
  assert ('kl' in results[0][1]) == ('hidden' in results[0][1]) == taught


@pytest.mark.parametrize('parts', [1, 2])
def test_a_batch_in_which_no_token_counts_is_a_loss_of_0(parts):
  model, mask = tiny(), train_mask(tiny(), 'blocks')
  tx = make_optimizer(mask, rate, 0.0, 1.0)
  state, frozen = init_state(model, mask, tx)
  before = copy(state.trained)
  zeros_L = np.zeros(L, np.float32)
  now = terms(weight_BT=np.zeros((4, 9), np.float32), gate_weight_L=zeros_L, delta_weight_L=zeros_L)
  now |= {'distill': np.float32(0.4), 'hidden': np.float32(0.5), 'kept_L': np.arange(L, dtype=np.int32)}
  step = make_step(tx, Mode(), parts, rate)
  state, metrics = step(state, (frozen, Decoder(SPEC, L, jax.random.key(7))), BATCHES_SBT[0], now)
  assert all(metrics[name] == 0 for name in ('loss', 'lm_loss', 'kl', 'hidden', 'grad_norm'))
  chex.assert_trees_all_equal(copy(state.trained), before)


def test_weights_of_one_are_no_weights():
  step, *_ = begin('blocks')
  results = []
  for more in ({}, {'weight_BT': np.ones((4, 9), np.float32)}):
    _, state, frozen = begin('blocks')
    state, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms(**more))
    results.append(jax.device_get(metrics))
  chex.assert_trees_all_close(*results, rtol=1e-6)


@pytest.mark.parametrize('kind', ['adamw', 'adafactor', 'lion'])
def test_weight_decay_is_for_matrices(kind):
  model = tiny()
  mask = train_mask(model, 'all')
  tx = make_optimizer(mask, rate, 0.5, 1.0, kind)
  state, _ = init_state(model, mask, tx)
  updates, _ = jax.jit(tx.update)(jax.tree.map(np.zeros_like, state.trained), state.opt_state, state.trained)
  weights = copy(state.trained)
  assert {'.embed.value', '.head.value', '.layers.w_down.value'} | NORMS < set(weights)
  for name, update in copy(updates).items():
    expected = 0 * weights[name] if name in NORMS else -0.01 * 0.5 * weights[name]
    np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)


def updates_of(tx, mask, steps: int = 1):
  """(updates of the last of some steps on random gradients, optimiser state), leaves by name."""
  state, _ = init_state(tiny(), mask, tx)
  opt_state = state.opt_state
  update = jax.jit(tx.update)
  for i in range(steps):
    grads = jax.tree.map(lambda a, i=i: 0.01 * jax.random.normal(jax.random.key(i), a.shape), state.trained)
    updates, opt_state = update(grads, opt_state, state.trained)
  return copy(updates), opt_state, copy(grads)


def test_the_default_is_optax_adamw_bit_for_bit():
  mask = train_mask(tiny(), 'blocks')
  plain = optax.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0)), mask)
  mine, theirs = updates_of(make_optimizer(mask, rate, 0.0, 1.0), mask, 3), updates_of(plain, mask, 3)
  chex.assert_trees_all_equal(mine[0], theirs[0])
  chex.assert_trees_all_equal(copy(mine[1]), copy(theirs[1]))


@pytest.mark.parametrize('kind', ['adamw', 'lion'])
def test_bfloat16_is_for_first_moments(kind):
  mask = train_mask(tiny(), 'blocks')
  full, half = (updates_of(make_optimizer(mask, rate, 0.0, 1.0, kind, d), mask, 3) for d in ('float32', 'bfloat16'))

  def dtypes(state, name):
    return {a.dtype.name for n, a in named(state).items() if f'.{name}.' in n}

  assert dtypes(full[1], 'mu') == {'float32'} and dtypes(half[1], 'mu') == {'bfloat16'}
  assert dtypes(half[1], 'nu') == dtypes(full[1], 'nu') == ({'float32'} if kind == 'adamw' else set())
  # lion takes signs, of which those near 0 may turn.
  different = [np.mean(np.abs(half[0][n] - full[0][n]) > 0.02 * 0.01) for n in full[0]]
  assert max(different) < 0.02


@pytest.mark.parametrize('kind', ['adafactor', 'lion'])
def test_first_step_is_the_sign_of_the_gradient(kind):
  # Of lion's mean with a moment of 0, and of g / sqrt(g^2): adafactor where nothing is factored.
  mask = train_mask(tiny(), 'blocks')
  updates, state, grads = updates_of(make_optimizer(mask, rate, 0.0, 1.0, kind), mask)
  for name in updates:
    np.testing.assert_allclose(updates[name], -0.01 * np.sign(grads[name]), rtol=1e-4, err_msg=name)


def test_adafactor_keeps_rows_and_columns():
  shape, tx = (L, 128, 256), make_optimizer({'w': True}, rate, 0.0, 1e9, 'adafactor')
  w, g = {'w': jnp.zeros(shape)}, {'w': jax.random.normal(jax.random.key(0), shape)}
  state = tx.init(w)
  assert sum(a.size for a in jax.tree.leaves(state)) < L * (128 + 256) + 10
  updates, _ = tx.update(g, state, w)
  # Shazeer and Stern's algorithm 4 for each layer alone, then clipped to a root mean square of 1 and scaled by the rate.
  squares_LRC = np.asarray(g['w'], np.float64) ** 2
  row_LR, column_LC = squares_LRC.mean(2), squares_LRC.mean(1)
  v_LRC = row_LR[:, :, None] * column_LC[:, None] / row_LR.mean(1)[:, None, None]
  u_LRC = np.asarray(g['w']) / np.sqrt(v_LRC)
  u_LRC /= max(1.0, np.sqrt((u_LRC**2).mean()))
  np.testing.assert_allclose(updates['w'], -0.01 * u_LRC, rtol=1e-4)


@pytest.mark.parametrize('scale, norm', [(1e-3, None), (10.0, 0.25), (1e4, 0.25)])
def test_gradients_are_clipped_by_their_global_norm(scale, norm):
  model = tiny()
  mask = train_mask(model, 'blocks')
  tx = make_optimizer(mask, rate, 0.0, 0.25)
  state, _ = init_state(model, mask, tx)
  grads = jax.tree.map(lambda a: scale * a, state.trained)
  grads = jax.tree.map(lambda a: a / optax.global_norm(state.trained), grads)  # of the norm `scale`
  _, opt_state = jax.jit(tx.update)(grads, state.opt_state, state.trained)
  mu = optax.tree_utils.tree_get(opt_state, 'mu')
  np.testing.assert_allclose(float(optax.global_norm(mu)), 0.1 * (scale if norm is None else norm), rtol=1e-4)


def test_metrics_of_a_step():
  step, state, frozen = begin('blocks')
  _, metrics = step(state, (frozen, None), BATCHES_SBT[0], terms())
  m = {k: np.asarray(v) for k, v in metrics.items()}
  np.testing.assert_allclose(m['loss'], m['lm_loss'] + m['gate_l1'] + m['penalty'], rtol=1e-6)
  np.testing.assert_allclose(m['penalty'], 0.1 * m['delta_L'].sum(), rtol=1e-6)
  np.testing.assert_allclose(m['gate_l1'], 0.01 * L, rtol=1e-6)
  np.testing.assert_allclose(m['lr'], 0.01, rtol=1e-6)
  assert m['grad_norm'] > 0 and m['delta_L'].shape == (L,) and (m['delta_L'] > 0).all()


class Recorder:
  """Stands for Checkpoints."""

  def __init__(self, *steps):
    self.steps, self.saved = steps, []

  def due(self, step: int) -> bool:
    return step in self.steps

  def save(self, state):
    self.saved.append(int(state.step))

  def wait(self):
    pass


@pytest.mark.parametrize('due', [(1, 2, 3, 4, 5), (3,), (2, 3), (4,), ()])
def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(due):
  step, state, frozen = begin('blocks')
  bad = terms(delta_weight_L=np.array([0, np.nan, 0], np.float32))
  logged, recorder = [], Recorder(*due)
  with pytest.raises(NonFiniteLoss, match='loss of step 3 is nan'):
    run_steps(
      step,
      state,
      (frozen, None),
      5,
      BATCHES_SBT,
      lambda i: bad if i == 2 else terms(),
      lambda i, m: logged.append(i),
      recorder,
    )
  assert recorder.saved == [s for s in due if s < 3] and logged == [0, 1]


def fake_step(losses, grad_norms):
  def step(state, fixed, batch, terms):
    return state._replace(step=state.step + 1), {'loss': losses[batch], 'grad_norm': grad_norms[batch]}

  return step


def test_a_gradient_that_is_not_finite_spoils_the_state_though_the_loss_is_finite():
  recorder, state = Recorder(1, 2, 3), TrainState(jnp.int32(0), None, None)
  step = fake_step([1.0, 1.0, 1.0], [1.0, np.inf, 1.0])
  with pytest.raises(NonFiniteLoss, match='gradient of step 2 is inf'):
    run_steps(step, state, None, 3, range(9), lambda i: {}, lambda i, m: None, recorder)
  assert recorder.saved == [1]


@pytest.mark.parametrize('due', [(), (1, 2, 3), (2,), (3,)])
@pytest.mark.parametrize('start', [0, 1, 3])
def test_each_step_is_logged_once_and_before_it_is_saved(start, due):
  events, recorder = [], Recorder(*due)
  recorder.save = lambda state: events.append(('save', int(state.step)))
  state = TrainState(jnp.int32(start), None, None)
  step = fake_step([5.0, 6.0, 7.0], [1.0] * 3)

  def log(i, m):
    return events.append((i, float(m['loss'])))

  state = run_steps(step, state, None, 3, range(9), lambda i: {}, log, recorder)
  expected = []
  for i in range(start, 3):
    expected += [(i, 5.0 + i)] + ([('save', i + 1)] if i + 1 in due else [])
  assert events == expected and int(state.step) == 3


def fit(step, state, frozen, steps, checkpoint=None):
  def change(i):
    return terms(delta_weight_L=np.full(L, i, np.float32))

  return run_steps(step, state, (frozen, None), steps, BATCHES_SBT, change, lambda i, m: None, checkpoint)


def test_saved_and_restored_is_bit_for_bit_the_straight_run(tmp_path):
  step, state, frozen = begin('all')
  straight = copy(fit(step, state, frozen, 6))
  checkpoints = Checkpoints(tmp_path / 'c', 3, 6)
  _, state, frozen = begin('all')
  half = copy(fit(step, state, frozen, 3, checkpoints))
  _, fresh, frozen = begin('all')
  restored = Checkpoints(tmp_path / 'c', 3, 6).latest(fresh)
  assert int(restored.step) == 3
  chex.assert_trees_all_equal(copy(restored), half)
  resumed = copy(fit(step, restored, frozen, 6))
  assert list(resumed) == list(straight)
  chex.assert_trees_all_equal(resumed, straight)
