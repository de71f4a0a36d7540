"""What a killed run does not repeat: closed-form fits, and the judgements of a search."""

import pathlib

import chex
import pytest
import safetensors.numpy
from tiny import config_of
from tiny import write_tiny_llama

from elder_jax.devices import preemption
from elder_jax.methods import ablation
from elder_jax.methods import judging
from elder_jax.recipes import RECIPES
from elder_jax.recipes import absorb
from elder_jax.recipes import streams
from elder_jax.run import fits
from elder_jax.run import pipeline
from elder_jax.run.notes import Notes
from elder_jax.training.batches import Batches


@pytest.fixture
def counted(monkeypatch) -> list:
  """A list that grows with each pass of residual streams that starts at the bottom of a model."""
  begun, at_the_bottom = [], streams.Streams.at_the_bottom.__func__

  def counting(cls, *args, **kwargs):
    begun.append(args)
    return at_the_bottom(cls, *args, **kwargs)

  monkeypatch.setattr(streams.Streams, 'at_the_bottom', classmethod(counting))
  return begun


def tensors(settings: dict) -> dict:
  return safetensors.numpy.load_file(pathlib.Path(settings['workdir']) / 'export/model.safetensors')


def stop_in_training(monkeypatch, settings: dict):
  """Runs until the third training batch after the fit, where a signal stops it."""
  fit = fits.fit

  def then_stop(*args):
    model, taken, batch = fit(*args), [], Batches.__getitem__

    def stopping(self, step):
      taken.append(step)
      patch.setattr(preemption, '_signalled', len(taken) == 3)
      return batch(self, step)

    patch.setattr(Batches, '__getitem__', stopping)
    return model

  with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
    patch.setattr(fits, 'fit', then_stop)
    pipeline.run(config_of(**settings))


def once(settings: dict, tmp_path) -> dict:
  """Returns the report of the same run without interruption."""
  return pipeline.run(config_of(**settings | dict(workdir=str(tmp_path / 'straight'))))


@pytest.mark.parametrize(
  'recipe, distill',
  [('absorb_then_train', 0.0), *((name, 0.5) for name, r in RECIPES.items() if r.reads_text and r.trains)],
)
def test_a_stopped_training_resumes_without_another_fit(recipe, distill, settings, tmp_path, monkeypatch, counted):
  export = RECIPES[recipe].exportable
  row = dict(recipe=recipe, compare=[]) if export else dict(recipe='none', compare=[recipe])
  settings |= dict(method='cosine_block', train_steps=4, checkpoint_every=1, distill=(distill,), num_sequences=16) | row
  monkeypatch.setattr(fits, 'WORTH', 0.0)
  straight = once(settings, tmp_path)
  assert counted
  stop_in_training(monkeypatch, settings)
  before = len(counted)
  report = pipeline.run(config_of(**settings))
  assert len(counted) == before
  assert report['rows'] == straight['rows'] and report['ppl'] == straight['ppl']
  if export:
    chex.assert_trees_all_equal(tensors(settings), tensors(settings | dict(workdir=str(tmp_path / 'straight'))))


def test_a_row_without_training_is_measured_without_another_fit(settings, tmp_path, monkeypatch, counted):
  settings |= dict(method='cosine_block', recipe='absorb', compare=[], eval_tokens=0)
  monkeypatch.setattr(fits, 'WORTH', 0.0)
  straight = once(settings, tmp_path)
  fit = fits.fit

  def stopped(*args):
    model = fit(*args)
    monkeypatch.setattr(preemption, '_signalled', True)
    return model

  monkeypatch.setattr(fits, 'fit', stopped)
  with pytest.raises(preemption.Preempted):
    pipeline.run(config_of(**settings))
  monkeypatch.setattr(preemption, '_signalled', False)
  before = len(counted)
  assert pipeline.run(config_of(**settings))['ppl'] == straight['ppl'] and len(counted) == before


def test_a_quick_fit_is_not_saved(settings, monkeypatch):
  settings |= dict(method='cosine_block', recipe='absorb_then_train', compare=[], train_steps=4, num_sequences=16)
  stop_in_training(monkeypatch, settings)
  assert not list((pathlib.Path(settings['workdir']) / 'checkpoints').glob('*.fitted'))


def test_an_unreadable_fit_is_repeated(settings, tmp_path, monkeypatch, capsys, counted):
  settings |= dict(method='cosine_block', recipe='absorb_then_train', compare=[], train_steps=4, num_sequences=16)
  monkeypatch.setattr(fits, 'WORTH', 0.0)
  straight, config = once(settings, tmp_path), config_of(**settings)
  stop_in_training(monkeypatch, settings)
  [kept] = (pathlib.Path(settings['workdir']) / 'checkpoints').glob('*.fitted')
  for path in (kept / '0').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  before = len(counted)
  assert pipeline.run(config)['ppl'] == straight['ppl'] and len(counted) > before
  assert 'this checkpoint cannot be read' in capsys.readouterr().err


@pytest.fixture
def deep(settings, tmp_path) -> dict:
  model = tmp_path / 'deep'
  write_tiny_llama(model, num_hidden_layers=10)
  return settings | dict(model=str(model), recipe='none', compare=[], score_steps=2, num_sequences=32)


@pytest.mark.parametrize('method', ['auto', 'swaps'])
def test_a_stopped_search_judges_nothing_twice(method, deep, tmp_path, monkeypatch):
  settings = deep | dict(method=method, swap_tries=6)
  absorbed, absorbing = [], absorb.absorb
  monkeypatch.setattr(absorb, 'absorb', lambda *args, **k: absorbed.append(sorted(args[1])) or absorbing(*args, **k))
  scored, scoring = [], ablation._loss_without_each
  monkeypatch.setattr(ablation, '_loss_without_each', lambda *args: scored.append(1) or scoring(*args))
  straight = once(settings, tmp_path)
  judged, passes = len(absorbed), len(scored)
  assert judged >= 2 and len({str(removed) for removed in absorbed}) == judged

  loss = judging.Judge._loss
  for stops in range(judged - 1):  # each attempt makes one more judgement
    done = []

    def stopping(self, removed, done=done):
      if done:
        raise preemption.Preempted('stopped')
      done.append(removed)
      return loss(self, removed)

    with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
      patch.setattr(judging.Judge, '_loss', stopping)
      pipeline.run(config_of(**settings))
    assert len(absorbed) == judged + stops + 1
  report = pipeline.run(config_of(**settings))
  assert len(absorbed) == 2 * judged and len(scored) == 2 * passes
  assert report['choices'] == straight['choices']


def test_unreadable_notes_are_empty(tmp_path, capsys):
  path = tmp_path / 'stage' / 'notes.json'
  notes = Notes(path)
  notes['a'], notes['b'] = [1, float('inf')], 0.1
  assert dict(Notes(path)) == {'a': [1, float('inf')], 'b': 0.1}
  path.write_text(path.read_text()[:-4])
  assert dict(Notes(path)) == {} and 'cannot be read' in capsys.readouterr().err
