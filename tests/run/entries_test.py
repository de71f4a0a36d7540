"""A method and a recipe, each added by one entry in this file, through everything that a run does."""

import json
import pathlib

import jax
import pytest
from tiny import config_of
from tiny import stop_at_batch

from elder_jax.errors import InputError
from elder_jax.methods.method import Method
from elder_jax.model import pruning
from elder_jax.recipes.context import Choice
from elder_jax.recipes.recipe import Recipe
from elder_jax.run import pipeline
from elder_jax.run import plan


def choose_middle(context, num_remove: int) -> Choice:
  first = (context.model.num_layers - num_remove) // 2
  return Choice(list(range(first, first + num_remove)), about={'note': 'from the middle'})


def start_halved(context, choice: Choice):
  """Removes the layers and halves the embedding, which no other recipe does."""
  model = pruning.prune(context.model, choice.removed)
  model.embed.set_value(model.embed.get_value() / 2)
  return model


middle = Method(choose_middle, 'layers from the middle', nested=False, reads_text=False, reads=())
halved = Recipe('halved, then train', 'half of the embedding', start_halved, trains=True)
row_only = Recipe('row', 'a row of the table only', start_halved, exportable=False)
no_entry = 3

METHOD, RECIPE = f'{__name__}:middle', f'{__name__}:halved'


@pytest.fixture
def own(settings) -> dict:
  more = dict(method=(METHOD, 'last'), recipe=RECIPE, compare=('none', f'{__name__}:row_only'), train_steps=3)
  return settings | more | dict(num_remove=None, ratio=(0.2, 0.4))


def test_the_plan(own, capsys):
  assert plan.plan(config_of(**own | dict(plan=True))) == 0
  out = capsys.readouterr().out
  assert 'training, 5 layers' in out and 'training, 4 layers' in out and 'All stages fit.' in out


def test_a_sweep_is_stopped_and_resumed(own, tmp_path, monkeypatch):
  straight = pipeline.run(config_of(**own | dict(workdir=str(tmp_path / 'straight'))))
  stop_at_batch(monkeypatch, 4, own)
  report = pipeline.run(config_of(**own))
  for name in ('rows', 'choices', 'removed', 'kept', 'ppl', 'recipe', 'method'):
    assert report[name] == straight[name], name
  assert report['choices'][0]['note'] == 'from the middle' and report['removed'] == [2]
  assert len(report['rows']) == 2 * 2 * 3

  work = pathlib.Path(own['workdir'])
  table = (work / 'report.md').read_text()
  assert '| halved, then train (exported) |' in table and METHOD in table and '| row |' in table
  card = (work / 'export' / 'README.md').read_text()
  assert RECIPE in card and 'halved, then train' in card and f'chosen by {METHOD}' in card
  assert json.loads((work / 'export' / 'config.json').read_text())['num_hidden_layers'] == 5
  assert (work / 'sweep.svg').stat().st_size > 1000


@pytest.mark.parametrize(
  'changes, sentence',
  [
    (dict(method=(f'{__name__}:no_entry',)), 'has type int, not elder_jax.methods.method.Method'),
    (dict(method=(f'{__name__}:absent',)), 'cannot be imported'),
    (dict(recipe='no.such.module:X'), 'cannot be imported'),
    (dict(recipe=f'{__name__}:middle'), 'not elder_jax.recipes.recipe.Recipe'),
    (dict(recipe=f'{__name__}:row_only'), 'no standard checkpoint can hold'),
    (dict(recipe='middle'), 'or give your own as package.module:NAME'),
  ],
)
def test_a_wrong_entry_is_refused(own, changes, sentence):
  with pytest.raises(InputError, match=sentence):
    config_of(**own | changes)


def test_a_method_that_reads_text_needs_programs():
  with pytest.raises(ValueError, match='needs .programs.'):
    Method(choose_middle, 'no plan')
  assert jax.devices()
