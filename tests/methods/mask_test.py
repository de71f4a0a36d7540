"""--method=mask: the draw, its gradient, what it learns, and resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of
from tiny import on_one_and_eight
from tiny import stop_at_batch
from tiny import tiny_decoder

from elder_jax.methods import mask
from elder_jax.model import pruning
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Context
from elder_jax.run import pipeline
from elder_jax.training import losses

L = 6
BATCHES = list(np.random.default_rng(0).integers(0, 40, (64, 4, 16), np.int32))


def settings_of(**changes):
  usual = dict(protect_first=0, protect_last=0, mask_steps=40, num_sequences=256, batch_size=4, seq_len=16)
  return config_of(**usual | changes)


@pytest.mark.parametrize('n', [1, 3, 5])
def test_exactly_n_layers_are_off_in_every_draw(n):
  config = settings_of()
  for step in range(20):
    terms = mask.terms(L, config, step)
    for score_L in (np.zeros(L), np.array([5, 5, 5, -5, 0, 0.0])):
      gate_L = np.asarray(mask.masked(jnp.asarray(score_L, jnp.float32), terms, n))
      assert sorted(np.unique(np.round(gate_L, 6))) == [0, 1] and (gate_L < 0.5).sum() == n
      off = np.argsort(-(score_L + terms['noise_L']))[:n]
      assert set(np.flatnonzero(gate_L < 0.5)) == set(off)


def test_ties_and_protected_layers():
  gate_L = mask.masked(jnp.zeros(L), {'noise_L': np.zeros(L, np.float32), 'temperature': np.float32(1)}, 2)
  assert (np.asarray(gate_L) < 0.5).sum() == 2
  terms = mask.terms(L, settings_of(protect_first=2, protect_last=1), 3)
  assert (np.flatnonzero(terms['noise_L'] < -1e8) == [0, 1, 5]).all()


def test_the_gradient_is_that_of_a_soft_mask_whose_sum_is_constant():
  config, weight_L = settings_of(), np.arange(1.0, L + 1)
  score_L, terms = jnp.asarray([0.3, -0.2, 0.1, 0.8, 0.0, -1.0]), mask.terms(L, config, 10)
  found_L = jax.grad(lambda s: jnp.sum(mask.masked(s, terms, 2) * weight_L))(score_L)
  noisy_L = np.asarray(score_L) + terms['noise_L']
  ordered_L, t = np.sort(noisy_L)[::-1], float(terms['temperature'])
  soft_L = 1 / (1 + np.exp(-((ordered_L[1] + ordered_L[2]) / 2 - noisy_L) / t))
  slope_L = soft_L * (1 - soft_L) / t
  others = np.sum(slope_L * weight_L) / np.sum(slope_L)
  np.testing.assert_allclose(found_L, -(weight_L - others) * slope_L, rtol=1e-4, atol=1e-6)
  assert abs(found_L.sum()) < 1e-5


def test_a_cold_mask_has_finite_gradients():
  """Where no layer is near the threshold, every slope underflows."""
  terms = {'noise_L': np.zeros(L, np.float32), 'temperature': np.float32(mask.COLDEST)}
  found_L = jax.grad(lambda s: jnp.sum(mask.masked(s, terms, 2) * jnp.arange(6.0)))(jnp.array([9.0, 9, -9, -9, -9, -9]))
  assert (np.asarray(found_L) == 0).all()


def test_the_temperature_falls_and_a_draw_depends_on_seed_and_step_only():
  config = settings_of()
  assert mask.terms(L, config, 0)['temperature'] == 1
  assert mask.terms(L, config, 39)['temperature'] == pytest.approx(mask.COLDEST)
  same = [mask.terms(L, config, 7)['noise_L'] for _ in 'ab']
  assert (same[0] == same[1]).all()
  assert (same[0] != mask.terms(L, settings_of(seed=1), 7)['noise_L']).all()
  assert 'distill' in mask.terms(L, config, 0) and 'distill' not in mask.terms(L, settings_of(mask_loss='lm'), 0)


@pytest.mark.parametrize('loss', ['kl', 'lm'])
def test_layers_without_effect_are_found(loss):
  """Layers 2 and 4 add nothing. Removing any other layer changes the predictions."""
  model = tiny_decoder()
  for weight in (model.layers.wo, model.layers.w_down):
    weight.set_value(weight.get_value().at[jnp.array([2, 4])].set(0))
  text = BATCHES
  if loss == 'lm':  # text that the model predicts well: its own most probable tokens
    forward = jax.jit(losses.forward)
    text = []
    for tokens_BT in BATCHES:
      tokens_BT = np.array(tokens_BT)
      for t in range(15):
        logits_BTV = losses.project(losses.head_of(model), forward(model, tokens_BT)[0], model.spec.outputs())
        tokens_BT[:, t + 1] = np.argmax(logits_BTV[:, t], -1)
      text.append(tokens_BT)
      if len(text) == 8:
        break
    text = text * 8
  choice = mask.choose(Context(model, text, settings_of(mask_loss=loss), Mode()), 2)
  assert sorted(choice.removed) == [2, 4]
  assert choice.scores[2] == max(choice.scores) or choice.scores[4] == max(choice.scores)


def test_a_stopped_run_resumes_exactly(settings, tmp_path, monkeypatch):
  settings |= dict(method='mask', mask_steps=6, recipe='none', compare=[], checkpoint_every=2, num_sequences=32)
  straight = pipeline.run(config_of(**settings | dict(workdir=str(tmp_path / 'straight'))))
  stop_at_batch(monkeypatch, 3, settings)
  report = pipeline.run(config_of(**settings))
  assert report['choices'] == straight['choices'] and report['ppl'] == straight['ppl']
  assert pruning.kept_layers(6, report['removed']) == report['kept']


def test_each_depth_of_a_sweep_learns_its_own_mask(settings, tmp_path):
  settings |= dict(method='mask', mask_steps=4, recipe='none', compare=[], num_remove=None, mask_lr=1.0)
  both = pipeline.run(config_of(**settings | dict(ratio='0.5,0.2')))
  for choice, ratio in zip(both['choices'], ('0.5', '0.2')):
    alone = pipeline.run(config_of(**settings | dict(ratio=ratio, workdir=str(tmp_path / ratio))))
    assert alone['choices'][0]['scores'] == choice['scores'] and alone['removed'] == sorted(choice['chosen'])
  assert both['choices'][0]['scores'] != both['choices'][1]['scores']


def test_eight_devices_learn_the_same_mask_as_one(eight_devices):
  def learn(model, batches):
    return mask.choose(Context(model, batches, settings_of(mask_steps=8), Mode()), 2)

  found = on_one_and_eight(tiny_decoder(), BATCHES, eight_devices, learn)
  assert found[0].removed == found[1].removed
  np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-3)
