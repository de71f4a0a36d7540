"""Stage 2: which layers are penalised when and how strongly, and the effect on their updates."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Endless
from tiny import leaves

from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.training import losses
from elder_jax.training import step as step_module
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.penalty import penalty_terms
from elder_jax.training.settings import TrainSettings
from elder_jax.training.step import make_step
from elder_jax.training.trainer import train

L = 4
BATCHES_SBT = np.random.default_rng(0).integers(0, 40, (8, 4, 9), np.int32)
MAKE_STEP, STEPS = make_step, {}


@functools.cache
def random_model(tied: bool) -> Decoder:
  spec = Spec(
    vocab_size=40,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    d_ff=24,
    norm_eps=1e-5,
    tied=tied,
    rope_freq_RH=((1.0, 0.1),),
  )
  return Decoder(spec, L, jax.random.key(0))


def tiny(tied=True) -> Decoder:
  return jax.tree.map(lambda a: a, random_model(tied))


def settings(**more) -> TrainSettings:
  return TrainSettings(**({'steps': 3, 'lr': 1e-3, 'lambda2': 0.5, 'order': 'joint'} | more))


def fit(
  model,
  layers,
  mode=Mode(),
  log=lambda i, m: None,
  checkpoint=None,
  batch=lambda i: BATCHES_SBT[i % 8],
  teacher=None,
  **more,
):
  s = settings(**more)
  # The settings that the step depends on: fits with the same key share a step, so that it compiles once.
  key = mode, dataclasses.replace(s, lambda2=0, lambda2_power=0, order='joint', anneal=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_module, 'make_step', lambda *args: STEPS.get(key) or STEPS.setdefault(key, MAKE_STEP(*args)))
    return train(model, layers, s, mode, Endless(batch), log, checkpoint, teacher)


def weights(layers, steps, **more) -> list[list[float]]:
  return [penalty_terms(L, layers, settings(steps=steps, **more), i)['delta_weight_L'].tolist() for i in range(steps)]


def skipped(layers, steps, **more) -> list[list[int]]:
  more |= {'steps': steps, 'order': 'sequential'}
  return [np.flatnonzero(~penalty_terms(L, layers, settings(**more), i)['alive_L']).tolist() for i in range(steps)]


def test_joint_puts_the_same_weight_on_all_chosen_layers_in_every_step():
  assert weights([2, 0], 3) == [[0.5, 0, 0.5, 0]] * 3
  terms = penalty_terms(L, [2, 0], settings(), 1)
  assert terms['alive_L'].all() and terms['alive_L'].dtype == bool and not terms['gate_weight_L'].any()
  assert {terms['gate_weight_L'].dtype, terms['delta_weight_L'].dtype} == {np.dtype('float32')}


@pytest.mark.parametrize(
  'power, ramp', [(0.0, [1, 1, 1, 1]), (1.0, [0.25, 0.5, 0.75, 1]), (2.0, [1 / 16, 0.25, 9 / 16, 1])]
)
def test_ramp_ends_at_lambda2(power, ramp):
  assert weights([1], 4, lambda2_power=power) == [[0, 0.5 * r, 0, 0] for r in ramp]


def test_sequential_penalises_the_layers_in_the_given_order():
  assert weights([3, 1], 4, order='sequential') == [[0, 0, 0, 0.5]] * 2 + [[0, 0.5, 0, 0]] * 2
  assert skipped([3, 1], 4) == [[], [], [3], [3]]


@pytest.mark.parametrize(
  'steps, layers, turns',
  [
    (5, [0, 1], [0, 0, 0, 1, 1]),
    (7, [0, 1, 2], [0, 0, 0, 1, 1, 2, 2]),
    (8, [0, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2]),
    (3, [0, 1, 2], [0, 1, 2]),
    (4, [0, 1, 2], [0, 0, 1, 2]),
    (1, [0], [0]),
  ],
)
def test_turns_if_the_layers_do_not_divide_the_steps(steps, layers, turns):
  assert [np.flatnonzero(w).tolist() for w in weights(layers, steps, order='sequential')] == [[t] for t in turns]
  assert skipped(layers, steps) == [list(range(t)) for t in turns]


def gates_of(layers, **more) -> list[list[float]]:
  return [penalty_terms(L, layers, settings(steps=4, **more), i)['gate_L'].tolist() for i in range(4)]


def test_annealed_gates_fall_to_zero_and_stay_there():
  assert gates_of([1]) == [[1] * L] * 4
  assert gates_of([1], anneal=1.0) == [[1, g, 1, 1] for g in (0.75, 0.5, 0.25, 0)]
  assert gates_of([2, 1], anneal=0.5) == [[1, g, g, 1] for g in (0.5, 0, 0, 0)]
  # Sequential: a layer whose turn is over is skipped, so its gate does not matter.
  assert gates_of([2, 1], anneal=1.0, order='sequential') == [
    [1, 1, 0.5, 1],
    [1, 1, 0, 1],
    [1, 0.5, 1, 1],
    [1, 0, 1, 1],
  ]


def test_removing_annealed_layers_does_not_change_the_loss():
  model, lm = tiny(), []
  trained = fit(model, [2, 1], log=lambda i, m: lm.append(m['lm_loss']), steps=4, anneal=0.5, lambda2=0.0, lr=0.0)
  pruned = pruning.prune(trained, [1, 2])
  tokens_BT = BATCHES_SBT[3]
  nll, count = losses.next_token_nll(pruned, forward(pruned, tokens_BT)[0], tokens_BT)
  np.testing.assert_allclose(lm[3], nll / count, rtol=1e-6)
  assert abs(lm[3] - lm[0]) > 1e-3


@pytest.mark.parametrize('steps', range(4, 14))
def test_every_layer_has_its_turn_and_its_whole_ramp(steps):
  w_SL = np.array(weights([2, 0, 3, 1], steps, order='sequential', lambda2_power=1.0))
  assert ((w_SL > 0).sum(1) == 1).all()
  for l in range(L):
    turn = w_SL[w_SL[:, l] > 0, l]
    np.testing.assert_allclose(turn, 0.5 * np.arange(1, len(turn) + 1) / len(turn), rtol=1e-6)
    assert len(turn) in (steps // L, -(-steps // L))


@pytest.mark.parametrize('steps', [1, 2, 3])
def test_fewer_steps_than_layers_give_some_layers_a_turn(steps):
  w_SL = np.array(weights([0, 1, 2, 3], steps, order='sequential', lambda2_power=1.0))
  assert ((w_SL == 0.5).sum(1) == 1).all() and ((w_SL > 0).sum(1) == 1).all()
  assert len(set(w_SL.argmax(1))) == steps


def test_without_layers_there_is_no_penalty():
  for sequential in (False, True):
    terms = penalty_terms(L, [], settings(order='sequential' if sequential else 'joint'), 2)
    assert terms['alive_L'].all() and not terms['delta_weight_L'].any()


@pytest.mark.parametrize('penalty, scale', [('l2', 'token'), ('l1', 'relative')])
def test_the_penalty_alone_drives_the_updates_to_zero(penalty, scale):
  model = tiny(tied=False)
  model.head.set_value(jnp.zeros_like(model.head.get_value()))  # so the LM loss is always log V
  metrics = []
  trained = fit(
    model,
    [1, 2],
    Mode(penalty=penalty, penalty_scale=scale),
    lambda i, m: metrics.append(m),
    batch=lambda i: BATCHES_SBT[0],
    steps=60,
    lr=0.02,
    lambda2=10.0,
  )
  np.testing.assert_allclose([m['lm_loss'] for m in metrics], np.log(40), rtol=1e-5)
  ratio_L = metrics[-1]['delta_L'] / metrics[0]['delta_L']
  assert ratio_L[1] < 0.05 and ratio_L[2] < 0.05, ratio_L
  old, new = leaves(model), leaves(trained)
  for name in old:  # layers after the last penalised one get no gradient
    if '.layers.' in name:
      np.testing.assert_array_equal(old[name][3], new[name][3])
      assert (old[name][[1, 2]] != new[name][[1, 2]]).any()


def test_training_without_a_penalty_equals_plain_lm_training():
  model, steps = tiny(), 3
  mine = fit(model, [], steps=steps)

  def lm_loss(layers, tokens_BT):
    changed = jax.tree.map(lambda a: a, model)
    changed.layers = layers
    x_BTD, _ = forward(changed, tokens_BT)
    logp_BTV = jax.nn.log_softmax(logits_of(changed, x_BTD)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1))

  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate(1e-3, steps, 0.05)))
  layers = jax.tree.map(lambda a: a, model.layers)
  state = tx.init(layers)

  @jax.jit
  def step(layers, state, tokens_BT):
    updates, state = tx.update(jax.grad(lm_loss)(layers, tokens_BT), state)
    return optax.apply_updates(layers, updates), state

  for i in range(steps):
    layers, state = step(layers, state, BATCHES_SBT[i])
  chex.assert_trees_all_close(leaves(mine.layers), leaves(layers), atol=2e-6)
  assert np.abs(leaves(mine.layers)['.wq.value'] - leaves(model.layers)['.wq.value']).max() > 1e-3


def test_lambda2_of_zero_equals_no_penalty_bit_for_bit():
  plain, zero, some = fit(tiny(), []), fit(tiny(), [1, 2], lambda2=0.0), fit(tiny(), [1, 2], lambda2=0.5)
  chex.assert_trees_all_equal(leaves(plain), leaves(zero))
  assert any((a != b).any() for a, b in zip(leaves(plain).values(), leaves(some).values()))


def plain_kl(teacher, model, tokens_BT):
  """Mean over predicted tokens of Σ_v p log(p / q), from whole logits."""
  logp_BTV, logq_BTV = (jax.nn.log_softmax(logits_of(m, forward(m, tokens_BT)[0])[:, :-1]) for m in (teacher, model))
  return jnp.mean(jnp.sum(jnp.exp(logp_BTV) * (logp_BTV - logq_BTV), -1))


@pytest.mark.parametrize('tied, chunk', [(True, 1024), (False, 8)])
def test_distillation_equals_the_formula(tied, chunk, monkeypatch):
  monkeypatch.setitem(losses.CHUNK_TOKENS, 'cpu', chunk)  # 8 tokens are 2 per row: chunks do not divide 9
  teacher, model, tokens_BT = tiny(tied), pruning.prune(tiny(tied), [1, 2]), BATCHES_SBT[0]
  terms = penalty_terms(L - 2, [], settings(), 0)

  def both(m, t, w):
    return losses.loss(m, tokens_BT, terms | ({'distill': np.float32(w)} if w else {}), Mode(), t)

  total, parts = both(model, teacher, 0.25)
  kl = plain_kl(teacher, model, tokens_BT)
  assert kl > 0.1
  np.testing.assert_allclose(parts['kl'], kl, rtol=1e-5)
  np.testing.assert_allclose(total, 0.75 * parts['lm_loss'] + 0.25 * kl, rtol=1e-5)
  lm_only = both(model, teacher, 0.0)
  assert 'kl' not in lm_only[1]
  np.testing.assert_allclose(parts['lm_loss'], lm_only[0], rtol=1e-6)
  # The teacher gets no gradient; the model gets that of the plain formula.
  to_model, to_teacher = jax.grad(lambda m, t: both(m, t, 1.0)[0], argnums=(0, 1))(model, teacher)
  assert all((g == 0).all() for g in leaves(to_teacher).values())
  plain = jax.grad(lambda m: plain_kl(teacher, m, tokens_BT))(model)
  chex.assert_trees_all_close(leaves(to_model.layers), leaves(plain.layers), atol=2e-6)


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it():
  log = []
  fit(tiny(), [], log=lambda i, m: log.append(m), steps=1, distill=1.0, teacher=tiny())
  assert abs(log[0]['kl']) < 1e-6 and log[0]['grad_norm'] < 1e-4


def test_distillation_reduces_the_kl_divergence_from_the_dense_model():
  teacher, cut = tiny(), pruning.prune(tiny(), [1])
  trained = fit(cut, [], steps=30, lr=3e-3, distill=1.0, teacher=teacher)
  near, far = (float(plain_kl(teacher, m, BATCHES_SBT[0])) for m in (trained, cut))
  assert near < 0.5 * far, (near, far)


def test_trained_leaves_and_logged_metrics():
  log = []
  model = tiny()
  old = leaves(model)
  new = leaves(
    fit(
      model,
      [2, 1],
      log=lambda i, m: log.append((i, m)),
      steps=4,
      order='sequential',
      trainable='all',
      lambda2_power=1.0,
    )
  )
  assert [i for i, _ in log] == [0, 1, 2, 3]
  delta_SL = np.array([m['delta_L'] for _, m in log])
  assert (delta_SL[2:, 2] == 0).all() and (delta_SL[:2, 2] > 0).all() and (delta_SL[:, [0, 1, 3]] > 0).all()
  expected = [0.25 * delta_SL[0, 2], 0.5 * delta_SL[1, 2], 0.25 * delta_SL[2, 1], 0.5 * delta_SL[3, 1]]
  np.testing.assert_allclose([m['penalty'] for _, m in log], expected, rtol=1e-6)
  assert {name for name in old if (old[name] == new[name]).all()} == {'.gate_L.value'}


def test_a_killed_training_resumes_exactly(tmp_path):
  options = dict(steps=6, order='sequential', lambda2_power=1.0, warmup_ratio=0.3, weight_decay=0.1)
  straight = fit(tiny(), [2, 1], **options)

  class Killed(BaseException):
    pass

  def dying(i):
    if i == 5:
      raise Killed
    return BATCHES_SBT[i]

  def checkpoints():
    return Checkpoints(tmp_path / 'c', 2, 6)

  with pytest.raises(Killed):
    fit(tiny(), [2, 1], checkpoint=checkpoints(), batch=dying, **options)
  steps = []
  resumed = fit(tiny(), [2, 1], log=lambda i, m: steps.append(i), checkpoint=checkpoints(), **options)
  assert steps == [4, 5]
  chex.assert_trees_all_equal(leaves(resumed), leaves(straight))
  # Rerunning a finished training does nothing.
  steps.clear()
  again = fit(tiny(), [2, 1], log=lambda i, m: steps.append(i), checkpoint=checkpoints(), **options)
  assert steps == []
  chex.assert_trees_all_equal(leaves(again), leaves(straight))
