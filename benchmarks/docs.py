"""The generated parts of docs/: python -m benchmarks.docs

They stand between two marks of a page, are written from the tables METHODS and RECIPES, from the families, the sources of
errors and the rows of results, and are compared with these by tests/docs_test.py.
"""

from collections.abc import Callable
import dataclasses
import pathlib
import re

from benchmarks import docs_errors
from benchmarks import headline
from benchmarks import results_figure
from benchmarks import results_table
from elder_jax.commands import models
from elder_jax.log import write_whole
from elder_jax.methods import METHODS
from elder_jax.recipes import RECIPES
from elder_jax.settings import default_of
from elder_jax.training.settings import TrainSettings

FOLDER = pathlib.Path(__file__).parents[1] / 'docs'
FIGURE = FOLDER / 'figures' / 'results.svg'


def methods() -> str:
  lines = ['| method | removes | paper | reads text |', '| --- | --- | --- | --- |']
  for name, method in METHODS.items():
    lines.append(f'| [`{name}`](#{name}) | {method.help} | {_paper(method.paper)} | {_yes(method.reads_text)} |')
  return '\n'.join(lines) + '\n'


def recipes() -> str:
  lines = ['| recipe | does | fits on text | trains | export |', '| --- | --- | --- | --- | --- |']
  for name, recipe in RECIPES.items():
    about = [_yes(recipe.reads_text), _yes(recipe.trains), _yes(recipe.exportable)]
    lines.append(f'| [`{name}`](#{anchor(name)}) | {recipe.help} | {" | ".join(about)} |')
  return '\n'.join(lines) + '\n'


def anchor(recipe: str) -> str:
  """Of its heading, which a recipe and the same one with training share."""
  name = re.sub('_(then_train|tuned)$', '', recipe)
  return {'prune': 'none'}.get(name, name)


def train_settings() -> str:
  lines = ['| field | default | |', '| --- | --- | --- |']
  for field in dataclasses.fields(TrainSettings):
    help = field.metadata.get('help', '').replace('|', '\\|')
    lines.append(f'| `{field.name}` | `{default_of(field)!r}` | {help} |')
  return '\n'.join(lines) + '\n'


def _yes(true: bool) -> str:
  return 'yes' if true else ''


def _paper(number: str) -> str:
  return f'[{number}](https://arxiv.org/abs/{number})' if number else ''


# (page, name of the part) -> its text.
PARTS: dict[tuple[str, str], Callable[[], str]] = {
  ('../README.md', 'headline'): headline.table,
  ('methods.md', 'methods'): methods,
  ('methods.md', 'recipes'): recipes,
  ('models.md', 'models'): lambda: models.table() + '\n',
  ('api.md', 'TrainSettings'): train_settings,
  ('errors.md', 'errors'): docs_errors.tables,
  ('results.md', 'SmolLM2'): lambda: results_table.smollm2_table(results_table.read()),
  ('results.md', 'Gemma'): lambda: results_table.gemma_table(results_table.read()),
  ('results/tables.md', 'rows'): lambda: results_table.document(results_table.read(), searched=False),
  ('results/search.md', 'rows'): lambda: results_table.document(results_table.read(), searched=True),
}


def filled(page: str) -> str:
  """The page with its parts as they are generated now."""
  text = (FOLDER / page).read_text(encoding='utf-8')
  for (of, name), make in PARTS.items():
    if of == page:
      begin, end = f'<!-- {name}: python -m benchmarks.docs -->\n', f'<!-- {name}: end -->'
      head, mark, rest = text.partition(begin)
      if not mark or end not in rest:
        raise ValueError(f'{page}: the marks of the part {name} are missing.')
      text = head + begin + '\n' + make() + '\n' + end + rest.partition(end)[2]
  return text


def write():
  for page in dict.fromkeys(page for page, _ in PARTS):
    write_whole(FOLDER / page, filled(page))
  write_whole(FIGURE, results_figure.svg(results_table.read()))


if __name__ == '__main__':
  write()
