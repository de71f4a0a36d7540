"""Distillation: the weight of the teacher over the steps, and its residual stream against the model's, by layer."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Endless
from tiny import tiny_decoder

from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.spec import Mode
from elder_jax.training import losses
from elder_jax.training.settings import TrainSettings
from elder_jax.training.terms import distill_weight
from elder_jax.training.terms import loss_terms
from elder_jax.training.trainer import begin_training
from elder_jax.training.trainer import train

LAYERS = 6


@functools.cache
def decoder(seed: int = 0) -> Decoder:
  """A model with random weights; another seed adds noise to the same weights. Do not modify."""
  model = tiny_decoder()
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  noisy = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(keys), a.shape), model)
  return pruning.with_gates(noisy if seed else model, 1.0)


def tokens(batch: int = 2, length: int = 11) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 40, (batch, length), np.int32)


# ---- weights over the steps ----


def weights(distill, steps: int) -> list[float]:
  settings = TrainSettings(distill=distill, steps=steps)
  return [distill_weight(settings, i) for i in range(steps)]


def test_the_weight_goes_along_a_cosine_from_the_first_step_to_the_last():
  np.testing.assert_allclose(weights((0.9, 0.5), 5), [0.9, 0.7 + 0.2 * 0.5**0.5, 0.7, 0.7 - 0.2 * 0.5**0.5, 0.5])
  np.testing.assert_allclose(weights((0.0, 1.0), 3), [0, 0.5, 1])
  assert weights(0.3, 4) == weights((0.3,), 4) == weights([0.3, 0.3], 4) == [0.3] * 4
  assert weights((0.9, 0.5), 1) == [0.9]


def test_settings_need_a_teacher_if_a_weight_is_above_0():
  assert TrainSettings(distill=0.5) == TrainSettings(distill=(0.5,))
  taught = [TrainSettings(distill=d, distill_hidden=h) for d, h in (((0.0,), 0.0), ((0.5, 0.0), 0.0), (0, 1.0))]
  assert [(s.distils, s.taught, s.taught_by) for s in taught] == [
    (False, False, ''),
    (True, True, 'distill'),
    (False, True, 'distill_hidden'),
  ]
  keys = [loss_terms(3, [], dataclasses.replace(s, steps=2), 1).keys() for s in taught]
  assert [k & {'distill', 'hidden', 'kept_L'} for k in keys] == [set(), {'distill'}, {'hidden', 'kept_L'}]


def test_another_weight_does_not_recompile():
  settings = TrainSettings(distill=(0.9, 0.1), distill_hidden=0.5, steps=4, lr=1e-3)
  step, state, frozen = begin_training(pruning.prune(decoder(), [2]), settings, Mode())
  found = []
  for i in range(4):
    kept = [0, 1, 3, 4, 5] if i < 3 else [0, 1, 2, 4, 5]
    terms = loss_terms(LAYERS - 1, [], settings, i, kept)
    state, metrics = step(state, (frozen, decoder()), tokens(), terms)
    weight = distill_weight(settings, i)
    mixed = (1 - weight) * metrics['lm_loss'] + weight * metrics['kl'] + 0.5 * metrics['hidden']
    np.testing.assert_allclose(metrics['loss'], mixed, rtol=1e-5)
    found.append(float(metrics['hidden']))
  assert step._cache_size() == 1 and len(set(found)) == 4


# ---- the residual stream ----


def streams(model: Decoder, skipped=()) -> list:
  """The residual stream after each layer, computed in a loop."""
  x_BTD = embed(model, tokens())
  tables, after = rope_tables(model.spec, x_BTD.shape[1]), []
  for l in range(model.num_layers):
    if l not in skipped:
      rope, window = rope_and_window(model.spec, tables, {})
      x_BTD = jax.tree.map(lambda a, l=l: a[l], model.layers)(x_BTD, jnp.float32(1), rope, Mode(), window)[0]
    after.append(x_BTD)
  return after


def error(s_BTD, t_BTD, weight_BT=None):
  """Mean of ‖s − t‖² / ‖t‖² over the tokens that have a next token."""
  error_BT = jnp.sum((s_BTD - t_BTD) ** 2, -1) / jnp.sum(t_BTD**2, -1)
  weight_BT = jnp.ones(error_BT.shape) if weight_BT is None else weight_BT
  return jnp.sum((error_BT * weight_BT)[:, :-1]) / jnp.sum(weight_BT[:, :-1])


def terms_of(model, **more) -> dict:
  settings = TrainSettings(steps=1, distill_hidden=2.0)
  return loss_terms(model.num_layers, [], settings, 0, more.pop('kept', None)) | more


@pytest.mark.parametrize('removed, weighted', [([1, 2], True), ([0, 3], False), ([5], False), ([0, 1, 2, 3, 4], True)])
def test_hidden_compares_each_output_with_the_teachers_before_the_next_kept_layer(removed, weighted):
  teacher, kept = decoder(7), pruning.kept_layers(LAYERS, removed)
  model = pruning.prune(decoder(), removed)
  weight_BT = np.random.default_rng(1).integers(0, 2, tokens().shape).astype(np.float32) if weighted else None
  more = {'weight_BT': weight_BT} if weighted else {}
  after = streams(teacher)
  place = [
    next_ - 1 for next_ in [*kept[1:], LAYERS]
  ]  # the dense layer whose output each layer's output is compared with
  expected = np.mean([error(s, after[l], weight_BT) for s, l in zip(streams(model), place)])

  def loss(m, hidden):
    terms = terms_of(m, kept=kept, hidden=jnp.float32(hidden), **more)
    return losses.loss(m, tokens(), terms, Mode(), teacher)

  total, parts = jax.jit(loss, static_argnums=1)(model, 2.0)
  np.testing.assert_allclose(parts['hidden'], expected, rtol=1e-5)
  np.testing.assert_allclose(total, parts['lm_loss'] + 2 * expected, rtol=1e-5)
  assert 'kl' not in parts and expected > 0.01


@pytest.mark.parametrize('remat', ['none', 'dots', 'full'])
def test_the_gradient_equals_the_plain_formula_and_the_teacher_gets_none(remat):
  removed, teacher = [1, 2, 4], decoder(7)
  model, kept = pruning.prune(decoder(), removed), pruning.kept_layers(LAYERS, removed)

  def of(m, t):
    return losses.loss(m, tokens(), terms_of(m, kept=kept), Mode(remat=remat), t)[0]

  def plain(m):
    x_BTD = streams(m)
    after = jax.lax.stop_gradient(streams(teacher))
    hidden = (error(x_BTD[0], after[2]) + error(x_BTD[1], after[4]) + error(x_BTD[2], after[5])) / 3
    nll, count = losses.next_token_nll(m, x_BTD[2] if m.final_norm is None else m.final_norm(x_BTD[2]), tokens())
    return nll / count + 2 * hidden

  to_model, to_teacher = jax.jit(jax.grad(of, argnums=(0, 1)))(model, teacher)
  assert all(not np.any(g) for g in jax.tree.leaves(to_teacher))
  expected = jax.jit(jax.grad(plain))(model)
  chex.assert_trees_all_close(jax.tree.leaves(to_model.layers), jax.tree.leaves(expected.layers), rtol=1e-4, atol=1e-6)


def test_a_skipped_layer_has_the_loss_of_a_removed_one():
  """So sequential training, which skips layers after their turns, ends with the loss of the pruned model."""
  teacher, removed = decoder(7), [0, 2]
  kept = pruning.kept_layers(LAYERS, removed)
  skipping = losses.loss(
    decoder(), tokens(), terms_of(decoder(), alive_L=np.isin(np.arange(LAYERS), kept)), Mode(), teacher
  )[1]
  cut = pruning.prune(decoder(), removed)
  _, pruned = losses.loss(cut, tokens(), terms_of(cut, kept=kept), Mode(), teacher)
  np.testing.assert_allclose(skipping['hidden'], pruned['hidden'], rtol=1e-6)


def test_hidden_is_0_for_a_model_that_is_its_own_teacher():
  assert losses.loss(decoder(), tokens(), terms_of(decoder()), Mode(), decoder())[1]['hidden'] == 0


def test_training_reduces_the_distance_of_the_streams():
  teacher, cut, log = decoder(), pruning.prune(decoder(), [2]), []
  settings = TrainSettings(steps=20, lr=3e-3, distill_hidden=100.0)
  batches = Endless(lambda i: tokens())
  train(cut, [], settings, Mode(), batches, lambda i, m: log.append(m), teacher=teacher, kept=[0, 1, 3, 4, 5])
  assert log[-1]['hidden'] < 0.5 * log[0]['hidden']


# ---- memory and devices ----


def step_memory(hidden: bool, remat: str, num_layers: int = 8):
  """(temporary bytes of a step, bytes of the residual stream at all layers); the model is smaller than activations."""
  model = jax.eval_shape(lambda: Decoder(decoder().spec, num_layers, jax.random.key(0)))
  settings = TrainSettings(steps=1, distill=0.5, distill_hidden=float(hidden))
  made = []

  def begin(m):
    made.append(begin_training(m, settings, Mode(remat=remat)))
    return made[-1][1:]

  state, frozen = jax.eval_shape(begin, model)
  B, T = 8, 512
  batch_BT = jax.ShapeDtypeStruct((B, T), 'int32')
  terms = loss_terms(num_layers, [], settings, 0)
  compiled = made[0][0].lower(state, (frozen, model), batch_BT, terms).compile()
  return compiled.memory_analysis().temp_size_in_bytes, 4 * num_layers * B * T * decoder().spec.d_model


# Without remat, the model's own residual stream is kept twice: it does not leave the branch that a layer runs in.
@pytest.mark.parametrize('remat, most', [('none', 2.5), ('dots', 1.3), ('full', 1.3)])
def test_memory_grows_by_the_teachers_stream_at_each_layer(remat, most):
  (without, _), (with_hidden, stream) = step_memory(False, remat), step_memory(True, remat)
  print(f'{remat}: {(with_hidden - without) / stream:.2f} streams more')
  assert 0 < with_hidden - without < most * stream


def test_metrics_are_the_same_on_a_mesh(eight_devices):
  """With token weights, micro-batches, KL divergence and hidden states."""
  whole, teacher, batch_BT = decoder(0), decoder(1), tokens(16, 9)
  weight_BT = np.random.default_rng(1).integers(0, 2, batch_BT.shape).astype(np.float32)
  settings = TrainSettings(steps=1, distill=(0.9, 0.5), distill_hidden=0.5, temperature=2.0, grad_accum=2, lr=1e-3)
  found = []
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(sizes, eight_devices[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
      places = sharding.for_model(whole, mesh, sizes)
      model, dense = (jax.tree.map(jax.device_put, m, places) for m in (whole, teacher))
      step, state, frozen = begin_training(model, settings, Mode(remat='dots'))
      terms = loss_terms(LAYERS, [], settings, 0) | {'weight_BT': sharding.put_batch(weight_BT, mesh)}
      _, metrics = step(state, (frozen, dense), sharding.put_batch(batch_BT, mesh), terms)
      found.append(jax.device_get(metrics))
  chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)
  assert found[0]['hidden'] > 0 and found[0]['kl'] > 0
