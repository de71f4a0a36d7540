"""Training with LoRA: against plain formulas, resumed, and in a whole run."""

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
from tiny import leaves
from tiny_lora import ALPHA
from tiny_lora import BATCHES_SBT
from tiny_lora import MATRICES
from tiny_lora import RANK
from tiny_lora import L
from tiny_lora import random_model

from elder_jax.hf.source import open_source
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.run import pipeline
from elder_jax.training import trainer
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import learning_rate
from elder_jax.training.settings import TrainSettings
from elder_jax.training.step import init_state
from elder_jax.training.trainer import train


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


def test_training_equals_the_formula():
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


def test_rank_zero_trains_without_lora():
  model = random_model()
  settings = TrainSettings(steps=1, lr=1e-2, lambda2=0.5, order='joint')

  def run(s):
    return leaves(train(model, [1], s, Mode(), Endless(lambda i: BATCHES_SBT[i])))

  plain, zero = run(settings), run(dataclasses.replace(settings, lora_rank=0, seed=3))
  chex.assert_trees_all_equal(zero, plain)
  assert {n for n in plain if 'norm' in n and '.layers.' in n and (plain[n] != leaves(model)[n]).any()}


def test_lora_learns_from_the_dense_teacher():
  log, teacher, cut = [], random_model(), pruning.prune(random_model(), [1])
  fit(cut, log=lambda i, m: log.append(m), steps=25, distill=1.0, teacher=teacher, batch=lambda i: BATCHES_SBT[0])
  assert log[-1]['kl'] < 0.7 * log[0]['kl'], (log[0]['kl'], log[-1]['kl'])


def test_bfloat16_base_with_float32_factors(monkeypatch):
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
def test_a_killed_sequential_training_resumes_exactly(tmp_path):
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


@pytest.mark.slow
def test_whole_runs(settings):
  """Penalty, annealing, closed form and distillation with LoRA, up to an export that is read back."""
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
