"""Shared hidden states while judging, the search by swaps, and the second comparison of auto's best candidates."""

import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_decoder
from tiny import write_tiny_llama

from elder_jax.errors import InputError
from elder_jax.methods import auto
from elder_jax.methods import contest
from elder_jax.methods import judging
from elder_jax.methods import swaps
from elder_jax.methods.method import Method
from elder_jax.model.spec import Mode
from elder_jax.recipes import streams
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.run import pipeline
from elder_jax.run import prepare
from elder_jax.run import work
from elder_jax.training import batches as batches_lib

BATCHES = list(np.random.default_rng(0).integers(0, 40, (8, 4, 16), np.int32))
FIT, HELD_OUT = BATCHES[:4], BATCHES[4:]


@pytest.mark.parametrize('block', ['pre', 'sandwich'])
def test_shared_layers_are_computed_once_and_change_no_loss(block, monkeypatch):
  model, choices = tiny_decoder(block=block), ([3, 4], [4], [3, 5])
  alone = judging.Judge(model, FIT, HELD_OUT, Mode())
  expected = [alone(removed) for removed in choices]
  shared = judging.Judge(model, FIT, HELD_OUT, Mode())
  shared.share(choices)

  def no_more(*_):
    raise AssertionError('computed from the first layer again')

  found = [shared(choices[0])]
  with monkeypatch.context() as patch:
    patch.setattr(streams, '_embed', no_more)
    found += [shared(removed) for removed in choices[1:]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert len(set(found)) == 3
  assert shared([1, 4]) == pytest.approx(alone([1, 4]), rel=1e-6)  # changes a layer below the shared ones
  assert shared([0, 4]) == pytest.approx(alone([0, 4]), rel=1e-6)


def context(model, **settings) -> Context:
  config = config_of(num_sequences=32, batch_size=4, seq_len=16, score_steps=4, **settings)
  return Context(model, BATCHES, config, Mode())


def first_method(removed) -> Method:
  """A method that starts the search with these layers and their loss."""

  def choose(context, num_remove):
    loss = judging.Judge(context.model, FIT, HELD_OUT, context.mode)(removed)
    return Choice(
      list(removed), about={'candidates': [{'method': 'x', 'removed': removed, 'loss': loss, 'scores': []}]}
    )

  return Method(choose, 'given', reads_text=False)


def test_swaps_end_where_no_single_swap_is_better():
  model, start = tiny_decoder(), [0, 5]
  judge = judging.Judge(model, FIT, HELD_OUT, Mode())
  choice = swaps.choose(first_method(start), context(model, swap_tries=1000), 2)
  best = judge(choice.removed)
  assert best < judge(start) and choice.about['swaps']
  assert best == pytest.approx(choice.about['loss'], rel=1e-6)
  for back in choice.removed:
    for out in set(range(6)) - set(choice.removed):
      assert judge(sorted({*choice.removed, out} - {back})) >= best
  removed = set(start)
  for back, out, _ in choice.about['swaps']:  # the reported swaps lead from the start to the result
    removed = removed - {back} | {out}
  assert sorted(removed) == choice.removed


@pytest.mark.parametrize('tries', [1, 3])
def test_swap_tries_is_the_number_of_swaps_tried(tries, monkeypatch):
  calls, judge = [], judging.Judge.__call__
  monkeypatch.setattr(judging.Judge, '__call__', lambda self, removed: calls.append(removed) or judge(self, removed))
  choice = swaps.choose(first_method([0, 5]), context(tiny_decoder(), swap_tries=tries), 2)
  assert len(calls) == 1 + tries and choice.about['tried'] == tries  # the first call judges the start


def test_swaps_are_tried_in_the_order_of_single_layer_perplexities():
  seen, order = set(), []
  while swap := swaps._next([0, 2], np.array([8.0, 3.0, 2.5, 1.0]), seen):
    order.append(swap[:2])
    seen.add(tuple(swap[2]))
  assert order == [(0, 3), (0, 1), (2, 3), (2, 1)]


@pytest.fixture
def deep(settings, tmp_path) -> dict:
  model = tmp_path / 'deep'
  write_tiny_llama(model, num_hidden_layers=10)
  more = dict(method='auto', recipe='absorb_then_train', compare=[], score_steps=1, num_sequences=24, train_steps=2)
  return settings | more | dict(model=str(model))


def test_the_best_three_are_judged_after_training(deep, monkeypatch):
  seen, train = [], contest.train

  def spy(model, layers, settings, mode, batches, *more, **named):
    seen.append((settings, {tuple(row) for i in range(settings.steps) for row in np.asarray(batches[i]).tolist()}))
    return train(model, layers, settings, mode, batches, *more, **named)

  monkeypatch.setattr(contest, 'train', spy)
  judged = {}

  def keep(model, choices, fit, held_out, *more):
    judged.update(rows={tuple(row) for batch in held_out for row in np.asarray(batch).tolist()})
    return real(model, choices, fit, held_out, *more)

  real = auto.judge
  monkeypatch.setattr(auto, 'judge', keep)
  report = pipeline.run(config_of(**deep | dict(judge_steps=3, lr=1e-2, distill=0.5)))
  candidates = report['choices'][0]['candidates']
  again = [c['again'] for c in candidates if c['again'] is not None]
  assert 2 <= len(again) <= 3 and len(seen) == len(again) and again == sorted(again)
  assert report['removed'] == sorted(candidates[0]['removed'])
  for settings, rows in seen:
    assert settings.steps == 3 and settings.lr == 1e-2 and settings.distill == (0.5,)
    assert not rows & judged['rows'], 'trained on held-out rows'
  assert 'judged again' in (config_of(**deep).path() / 'report.md').read_text()


def test_each_depth_of_a_sweep_is_judged_after_its_own_training(deep, tmp_path):
  settings = deep | dict(judge_steps=2, num_remove=None, compare=[])
  both = pipeline.run(config_of(**settings | dict(ratio='0.3,0.2')))
  for choice, ratio in zip(both['choices'], ('0.3', '0.2')):
    alone = pipeline.run(config_of(**settings | dict(ratio=ratio, workdir=str(tmp_path / ratio))))
    assert alone['choices'][0]['candidates'] == choice['candidates']


def fewest_below(model, context) -> float:
  """A function of the user's own: the sum of absolute query weights."""
  assert context.settings.removal.method == ('auto',) and model.num_layers == 8
  return float(np.abs(np.asarray(model.layers.wq[...])).sum())


def test_the_users_own_function_decides(deep):
  report = pipeline.run(config_of(**deep | dict(judge_by=f'{__name__}:fewest_below')))
  again = [c['again'] for c in report['choices'][0]['candidates'] if c['again'] is not None]
  assert len(again) >= 2 and again == sorted(again) and again[0] < again[-1]


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(judge_by='piqa'), 'judge_by=piqa: is not one of --tasks'),
    (dict(judge_by='quick', tasks='quick'), 'judge_by=quick: is not one of --tasks'),
    (dict(judge_by='no.such:thing'), 'judge_by=no.such:thing: cannot be imported'),
    (dict(judge_steps=5), 'but only 4 of the 6 batches are left'),
  ],
)
def test_an_impossible_second_comparison_is_refused(deep, changes, sentence):
  with pytest.raises(InputError, match=sentence):
    pipeline.run(config_of(**deep | changes))


@pytest.mark.parametrize(
  'values, expected',
  [({'acc': 0.25, 'n': 4}, 0.25), ({'exact_match,strict': 0.5, 'n': 4}, 0.5), ({'ppl': 9.0}, None), ({}, None)],
)
def test_a_task_is_judged_by_its_accuracy(values, expected):
  if expected is not None:
    assert work._score('some', values) == expected
    return
  with pytest.raises(InputError, match='judge_by=some: has no fraction of correct answers'):
    work._score('some', values)


def test_a_task_of_the_run_decides(deep, monkeypatch):
  """With a fake harness, in which the second candidate has the highest accuracy."""
  asked = []

  def figures(job, model, name):
    asked.append(name)  # the dense model is measured as well
    return {'piqa': {'acc': 0.9 if asked.count('a candidate') == 2 else 0.1}}

  monkeypatch.setattr(work, '_task_figures', figures)
  monkeypatch.setattr(prepare.zero_shot, 'load_tasks', lambda *_: {'tasks': {}})
  report = pipeline.run(config_of(**deep | dict(judge_by='piqa', tasks='quick')))
  again = [c['again'] for c in report['choices'][0]['candidates'] if c['again'] is not None]
  assert again[0] == -0.9 and set(again[1:]) == {-0.1}


def test_a_slice_of_batches_keeps_the_weights_of_its_tokens():
  class Rows:
    masked = True

    def __len__(self):
      return 12

    def __getitem__(self, numbers):
      return np.repeat(np.asarray(numbers)[:, None], 4, 1).astype(np.int32)

    def counted(self, numbers):
      return np.asarray(numbers)[:, None] % 2 == np.zeros((1, 4))

  whole = batches_lib.Batches(Rows(), 2, seed=3)
  part = whole[2:5][1:]
  for i in range(2):
    np.testing.assert_array_equal(part[i], whole[3 + i])
    np.testing.assert_array_equal(part.weight_BT(i), whole.weight_BT(3 + i))
