"""--method=auto: its candidates, their losses, and whole runs."""

import json
import pathlib

import chex
import jax
import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_decoder
from tiny import write_tiny_llama

from elder_jax import methods
from elder_jax.errors import InputError
from elder_jax.methods import auto
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb
from elder_jax.recipes.context import Context
from elder_jax.run import pipeline
from elder_jax.run.how_much import count_removed
from elder_jax.training import losses

BATCHES = list(np.random.default_rng(0).integers(0, 40, (6, 4, 16), np.int32))
FIT, HELD_OUT = BATCHES[:3], BATCHES[3:]
CHOICES = {'a': [4, 2], 'b': [3, 4], 'c': [2, 4], 'd': [1, 2]}


def plain_loss(model: Decoder) -> float:
  """Returns the mean of −log p over the held-out tokens, from the full logits."""
  nll = []
  for tokens_BT in HELD_OUT:
    logit_BTV = np.asarray(logits_of(model, forward(model, tokens_BT)[0]), np.float64)
    log_p_BTV = logit_BTV - np.log(np.exp(logit_BTV).sum(-1, keepdims=True))
    nll.append(-np.take_along_axis(log_p_BTV[:, :-1], tokens_BT[:, 1:, None], -1))
  return float(np.mean(nll))


@pytest.mark.parametrize('block', ['pre', 'sandwich', 'post'])
def test_candidates_are_judged_by_the_held_out_loss_after_absorb(block):
  model = tiny_decoder(block=block)
  begun = jax.tree.map(np.asarray, jax.tree.leaves(model))
  said = []
  candidates = auto.judge(model, CHOICES, FIT, HELD_OUT, Mode(), said.append)
  assert [c.method for c in said] == ['a', 'b', 'd']  # c chooses the same layers as a
  assert {c.method: c.removed for c in candidates} == {m: CHOICES[m] for m in 'abd'}
  assert [c.loss for c in candidates] == sorted(c.loss for c in candidates)
  for c in candidates:
    if block == 'post':
      left = pruning.prune(model, c.removed)
    else:
      left = absorb.absorb(model, c.removed, FIT, Mode(), after=0, attention=False)
    assert c.loss == pytest.approx(plain_loss(left), rel=1e-5)
  assert len({round(c.loss, 5) for c in candidates}) == 3
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, jax.tree.leaves(model)), begun)


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch):
  monkeypatch.setattr(losses, 'batch_nll', lambda *_: (np.float32(np.nan), np.float32(1)))
  with pytest.raises(InputError, match='method=auto: some losses are not finite'):
    auto.judge(tiny_decoder(), CHOICES, FIT, HELD_OUT, Mode())


@pytest.mark.parametrize(
  'num_sequences, batch_size, score_steps, expected', [(64, 4, 4, 4), (128, 4, 8, 8), (12, 4, 8, 1), (8, 4, 1, 1)]
)
def test_as_many_batches_are_held_out_as_fitted(num_sequences, batch_size, score_steps, expected):
  assert auto.num_fitted(score_steps, num_sequences // batch_size) == expected


@pytest.mark.parametrize(
  'num_layers, num_remove, expected',
  [
    (9, 3, ['cosine_block', 'shortgpt', 'taylor', 'ppl']),
    (9, 4, ['cosine_block', 'shortgpt']),
    (2, 1, ['cosine_block', 'shortgpt']),
  ],
)
def test_methods_that_cannot_remove_enough_layers_are_no_candidates(num_layers, num_remove, expected):
  candidates = {name: methods.METHODS[name] for name in auto.PARTS}
  assert list(auto.usable(candidates, config_of(), num_layers, num_remove)) == expected


def test_protected_layers_limit_elder_but_not_auto():
  settings = dict(num_remove=6, protect_first=3, protect_last=4)
  assert count_removed(config_of(method='auto', **settings), tiny_decoder().spec, 10, 'float32') == [6]
  with pytest.raises(InputError, match='--protect_first=3'):
    count_removed(config_of(method='elder', **settings), tiny_decoder().spec, 10, 'float32')
  with pytest.raises(InputError, match='--protect_first=3'):
    count_removed(config_of(method='auto,elder', **settings), tiny_decoder().spec, 10, 'float32')


@pytest.fixture
def deep(settings, tmp_path) -> dict:
  """Settings of a whole run with auto on ten layers, where the candidates choose different layers."""
  model = tmp_path / 'deep'
  write_tiny_llama(model, num_hidden_layers=10)
  return settings | dict(model=str(model), method='auto', recipe='absorb', compare=[], score_steps=1)


def test_a_run_exports_the_best_candidate_and_reports_all(deep, tmp_path):
  report = pipeline.run(config_of(**deep))
  choice, work = report['choices'][0], pathlib.Path(deep['workdir'])
  assert json.loads((work / 'report.json').read_text())['choices'] == report['choices']
  candidates = choice['candidates']
  assert len(candidates) >= 2 and candidates[0]['loss'] == min(c['loss'] for c in candidates)
  assert choice['chosen'] == candidates[0]['removed'] and report['removed'] == sorted(choice['chosen'])
  assert all(len(c['scores']) > 2 for c in candidates) and len({str(c['scores']) for c in candidates}) == len(
    candidates
  )
  assert f'{candidates[1]["method"]} {sorted(candidates[1]["removed"])}' in (work / 'report.md').read_text()
  assert f'chosen by auto ({candidates[0]["method"]})' in (work / 'export/README.md').read_text()
  for c in candidates:  # each method alone chooses the same
    alone = pipeline.run(config_of(**deep | dict(method=c['method'], workdir=str(tmp_path / c['method']))))
    assert alone['removed'] == sorted(c['removed']) and alone['choices'][0]['scores'] == c['scores']
    if c is candidates[0]:
      assert alone['rows'][0]['ppl'] == report['rows'][0]['ppl']


def test_held_out_batches_are_neither_fitted_nor_scored_on(deep, monkeypatch):
  seen = {'scored': set()}

  def rows(batches):
    return {tuple(row) for batch in batches for row in np.asarray(batch).tolist()}

  judged, scored = auto.judge, Context.scored.fget

  def spy_scored(context):
    seen['scored'] |= rows(scored(context))
    return scored(context)

  def spy_judge(model, choices, fit, held_out, *more):
    seen.update(fit=rows(fit), held_out=rows(held_out))
    return judged(model, choices, fit, held_out, *more)

  monkeypatch.setattr(Context, 'scored', property(spy_scored))
  monkeypatch.setattr(auto, 'judge', spy_judge)
  pipeline.run(config_of(**deep | dict(score_steps=8)))  # more than the text has
  assert len(seen['fit']) == len(seen['held_out']) == 4 and seen['scored'] == seen['fit']
  assert not seen['fit'] & seen['held_out']


def test_a_text_of_a_single_batch_is_refused(deep, no_text):
  with pytest.raises(InputError) as caught:
    pipeline.prepare(config_of(**deep | dict(batch_size=8)))
  said = caught.value.for_command()
  assert all(flag in said for flag in ('--num_sequences=8', '--batch_size=8', '--method=cosine_block'))


def test_each_depth_of_a_sweep_is_judged_on_its_own(deep):
  report = pipeline.run(config_of(**deep | dict(num_remove=None, ratio='0.2,0.3,0.6')))
  assert [len(c['chosen']) for c in report['choices']] == [2, 3, 6]
  assert all(c['candidates'] for c in report['choices'])
  methods_of = [{c['method'] for c in choice['candidates']} for choice in report['choices']]
  assert len(methods_of[0]) > 1 and methods_of[2] <= {
    'cosine_block',
    'shortgpt',
  }  # the others have 4 layers to choose from
