"""Every method and recipe that reads text reports its progress up to the end."""

import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_decoder

from elder_jax.log import Log
from elder_jax.methods import METHODS
from elder_jax.recipes import RECIPES
from elder_jax.recipes import streams
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.training.batches import Batches

L = 9
BATCHES = Batches(np.random.default_rng(0).integers(0, 40, (16, 16), np.int32), 4, seed=None)
BLOCKS = {
  'pre': dict(),
  'parallel': dict(block='parallel', shared_norm=True),
  'sandwich': dict(norm='rms1', block='sandwich'),
}


class RecordingLog(Log):
  """Records the calls of each progress function."""

  def __init__(self):
    self.calls: list[tuple[str, list[tuple[int, int]]]] = []

  def progress(self, what: str, tokens: int = 0):
    calls = []
    self.calls.append((what, calls))
    return lambda done, of, note='': calls.append((done, of))


def context(log: Log, **block) -> Context:
  settings = dict(
    num_sequences=16, batch_size=4, seq_len=16, score_steps=2, num_remove=3, swap_tries=2, mask_steps=3, gate_steps=3
  )
  return Context(tiny_decoder(num_layers=L, **block), BATCHES, config_of(**settings), log=log)


def assert_progress(log: RecordingLog, part: str):
  found = [calls for what, calls in log.calls if what.startswith(part)]
  assert found
  for calls in found:
    done = [d for d, _ in calls]
    assert len({of for _, of in calls}) == 1 and done[-1] == calls[0][1] and done == sorted(done)
  assert max(len({d for d, _ in calls}) for calls in found) > 1


@pytest.mark.parametrize('removed', [[3, 4, 7], [0, 8], [1, 3, 5]], ids=str)
@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('recipe', [name for name, r in RECIPES.items() if r.reads_text and not r.trains])
def test_a_recipe_reports_its_passes_and_predicts_their_number(recipe, block, removed, monkeypatch):
  log, passes = RecordingLog(), []
  begin = context(log, **BLOCKS[block])
  if RECIPES[recipe].refuses(begin.model.spec):
    return
  end = streams.Passes.end
  monkeypatch.setattr(streams.Passes, 'end', lambda self: (passes.append((self._done, self._of)), end(self)))
  RECIPES[recipe].start(begin, Choice(removed))
  assert_progress(log, 'fitting')
  [(done, of)] = passes
  assert of - 1 < done + 1e-6 and done <= of + 1e-6


@pytest.mark.parametrize('method', [name for name, m in METHODS.items() if m.reads_text])
def test_a_method_reports_its_progress(method):
  log = RecordingLog()
  METHODS[method].choose(context(log), 3)
  parts = {'elder': 'stage 1', 'mask': 'learning', 'laco': 'merging', 'swaps': 'swapping'}
  assert_progress(log, parts.get(method, 'scoring'))


def test_the_progress_of_sleb_counts_all_rounds():
  log = RecordingLog()
  METHODS['sleb'].choose(context(log), 3)
  assert log.calls == [('scoring layers', [(i + 1, 6) for i in range(6)])]
