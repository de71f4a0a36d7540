"""docs/: the generated parts, and what the pages must hold. make docs checks links and anchors."""

import pathlib
import re

import pytest
import yaml

from benchmarks import docs
from benchmarks import docs_errors
from benchmarks import results_figure
from benchmarks import results_table
import elder_jax
from elder_jax.methods import METHODS
from elder_jax.recipes import RECIPES

DECISIONS = sorted(path for path in (docs.FOLDER / 'decisions').glob('*.md'))


def read(page: str) -> str:
  return (docs.FOLDER / page).read_text(encoding='utf-8')


@pytest.mark.parametrize('page', dict.fromkeys(page for page, _ in docs.PARTS))
def test_a_page_holds_what_is_generated(page):
  assert docs.filled(page) == read(page), 'run python -m benchmarks.docs'


def test_the_figure_shows_the_rows():
  described = results_figure.described(results_table.read())
  assert described in docs.FIGURE.read_text(encoding='utf-8'), 'run python -m benchmarks.docs'
  assert 'WikiText-2 test, absorb, then train: 26 layers 23.15, 23 layers 26.87, 20 layers 41.32' in described


def test_every_method_and_recipe_has_its_paragraph():
  headings = set(re.findall(r'^### `(\w+)`$', read('methods.md'), re.MULTILINE))
  assert headings == {*METHODS, *map(docs.anchor, RECIPES)}


def test_every_public_name_is_on_the_page_of_the_api():
  page = read('api.md')
  for name in elder_jax.__all__:
    shown = re.search(rf'^::: elder_jax\.[\w.]*\b{name}$', page, re.MULTILINE)
    assert shown or f'`ej.{name}`' in page or name == '__version__', name


def slug(heading: str) -> str:
  return re.sub(r'[^a-z0-9 -]', '', heading.lower()).replace(' ', '-')


def test_a_claim_is_short_and_its_figures_are_in_the_rows_that_it_links_to():
  claims = re.findall(r'^\d\. (.*?\))$', read('results.md'), re.MULTILINE | re.DOTALL)
  assert len(claims) == 8
  for claim in claims:
    text, page, anchor = re.fullmatch(r'(.*)\s\[Rows\]\(([\w/.]+)#([\w-]+)\)', claim, re.DOTALL).groups()
    assert len(text.split()) <= 25, text
    figures = re.findall(r'\d+\.\d+', text)
    sections = {
      re.sub(r'[^a-z0-9 -]', '', s.split('\n')[0].lower()).replace(' ', '-'): s for s in read(page).split('\n## ')
    }
    assert len(figures) == 2 and all(figure in sections[anchor] for figure in figures), text


@pytest.mark.parametrize('path', DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_its_reason_its_evidence_and_its_date_the_newest_first(path):
  records = path.read_text(encoding='utf-8').split('\n## ')[1:]
  dates = []
  for record in records:
    assert '- **Why' in record and '- **Evidence:**' in record, record
    dates.append(re.search(r'- \*\*Status:\*\* .*(\d{4}-\d\d-\d\d)', record)[1])
  assert records and dates == sorted(dates, reverse=True)


def test_a_message_is_found_by_its_sentence():
  sentence = docs_errors.Sentence('run/x', 'mesh', 'makes … devices, there are …; let the sizes multiply to that.')
  assert sentence.matches('--mesh=1,7,1: makes 7 devices, there are 8; let the sizes multiply to that.')
  assert not sentence.matches('--mesh=1,7,1: makes 7 devices.')
  assert sentence.parts == ('makes … devices, there are …', 'let the sizes multiply to that')
  assert len(docs_errors.sentences()) > 200 and all(map(docs_errors.group_of, docs_errors.sentences()))


def test_the_site_needs_no_network():
  config = yaml.safe_load((docs.FOLDER.parent / 'mkdocs.yml').read_text(encoding='utf-8'))
  assert config['theme']['font'] is False and 'extra_javascript' not in config
  assert all(pathlib.Path(docs.FOLDER / path).is_file() for path in config['extra_css'])
