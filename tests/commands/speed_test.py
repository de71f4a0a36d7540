"""The speed command: the order of measurements, the results, and both frameworks on a tiny model."""

import itertools
import json
import time

import numpy as np
import pytest
from tiny import config_of

from elder_jax.commands import speed
from elder_jax.commands.command import out_file
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.run import pipeline
from elder_jax.run import timing
from elder_jax.run.timing import SpeedSettings

QUICK = dict(prompt_tokens=24, new_tokens=3, context=5, batch_sizes=(1, 2), repeats=3)


def test_runs_alternate_after_an_untimed_one():
  calls, clock = [], itertools.count(0.0, 0.5)
  seconds = timing.alternate([lambda: calls.append('a'), lambda: calls.append('b')], 3, lambda: next(clock))
  assert calls == ['a', 'b'] * 4 and seconds == [[0.5] * 3] * 2


def test_results_are_medians():
  row = timing.figures([4.0, 100.0, 2.0], [2.0, 1.0, 90.0], 8, 6, 0, absolute=False)
  assert row['ratio'] == 2.0 and row['ideal'] == 8 / 6 and row['of_ideal'] == pytest.approx(1.5)
  assert row['ratios'] == [2.0, 100.0, 2.0 / 90] and 'dense' not in row
  prompt = timing.figures([2.0], [1.0], 8, 6, 0, absolute=True)
  assert (prompt['dense'], prompt['pruned'], prompt['unit']) == (2000.0, 1000.0, 'ms')
  generation = timing.figures([2.0], [1.0], 8, 6, 128, absolute=True)
  assert (generation['dense'], generation['pruned'], generation['unit']) == (64.0, 128.0, 'tokens/s')


@pytest.fixture(scope='module')
def exported(tiny, tmp_path_factory):
  work = tmp_path_factory.mktemp('work')
  settings = dict(remove_layers='2,3,4', recipe='none', compare=(), verify='jax')
  pipeline.run(config_of(model=str(tiny), workdir=str(work), **settings))
  return work / 'export'


@pytest.mark.parametrize('framework', ['jax', 'torch', 'memory'])
@pytest.mark.filterwarnings('ignore')  # of transformers
def test_a_measurement(tiny, exported, tmp_path, framework):
  out = tmp_path / 'speed.json'
  what = dict(remove_layers=(2, 3, 4)) if framework == 'memory' else dict(pruned=str(exported))
  ticks = iter(np.cumsum(np.tile([0.0, 2.0, 0.0, 1.0], 9)))  # dense takes 2 s, pruned 1 s
  settings = SpeedSettings(model=str(tiny), torch=framework == 'torch', out=str(out), **what, **QUICK)
  result = timing.measure(settings, lambda: float(next(ticks)), out)
  assert result['layers'] == {'dense': 6, 'pruned': 3}
  assert [row['what'] for row in result['rows']] == [
    'prompt of 24',
    '5 + 3 tokens, batch 1',
    '5 + 3 tokens, batch 2',
  ]
  assert [(row['ratio'], row['of_ideal']) for row in result['rows']] == [(2.0, 1.0)] * 3
  assert next(ticks, None) is None  # each call read the clock exactly twice
  assert json.loads(out.read_text()) == json.loads(json.dumps(result))
  text = speed.markdown(result)
  assert '| prompt of 24 | 2.000 | 2.000 | 1.000 |' in text and '6 → 3 layers' in text
  assert ('torch' in result['versions']) == (framework == 'torch')


@pytest.mark.parametrize('work', ['prompt', 'generate'])
def test_more_work_takes_longer(tiny, work):
  """The work is finished when the clock is read: real times, for a small and a much larger input."""
  (model, _), _ = timing._in_jax(open_source(str(tiny), tiny), None, [2], 'float32')
  run = getattr(model, work)
  few, many = ((np.zeros((1, 8), np.int32),), (np.zeros((32, 192), np.int32),))
  more = (3,) if work == 'generate' else ()
  short, long = timing.alternate([lambda: run(*few, *more), lambda: run(*many, *more)], 3, time.perf_counter)
  assert np.median(long) > 2 * np.median(short)


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(), ['give either --pruned']),
    (dict(pruned='x', remove_layers=(1,)), ['give either --pruned']),
    (dict(remove_layers=(1,), repeats=0), ['--repeats=0']),
    (dict(remove_layers=(1,), batch_sizes=(1, 0)), ['--batch_sizes=1,0']),
    (dict(remove_layers=(1,), seed=-1), ['--seed=-1']),
    (dict(remove_layers=(9,)), ['--remove_layers=9', '0 to 5']),
    (dict(remove_layers=(1,), torch=True), ['--torch', 'folders']),
    (dict(remove_layers=(1,), out='/'), ['--out=/']),
    (dict(pruned='nowhere'), ['--pruned=nowhere']),
  ],
)
def test_bad_input(tiny, changes, words):
  with pytest.raises(InputError) as e:
    settings = SpeedSettings(model=str(tiny), **changes)
    settings.check()
    timing.measure(settings, out=out_file(settings.out))
  assert all(word in e.value.for_command() for word in words), e.value


def test_the_dense_model_is_not_a_pruned_one(tiny):
  with pytest.raises(InputError, match='with fewer layers; check both'):
    timing.measure(SpeedSettings(model=str(tiny), pruned=str(tiny)))
