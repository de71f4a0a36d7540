"""The house as CONTRIBUTING has it: sizes of files and functions, and that all its names are there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'elder_jax').rglob('*.py'))
TESTS = sorted((ROOT / 'tests').rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_over_350_lines_and_no_function_over_60(path):
  text = path.read_text(encoding='utf-8')
  assert text.count('\n') <= 350
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
      assert node.end_lineno - first + 1 <= 60, node.name


@pytest.mark.parametrize('path', TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_of_tests_over_350_lines(path):
  assert path.read_text(encoding='utf-8').count('\n') <= 350


def test_the_pipeline_is_a_page():
  assert (ROOT / 'elder_jax/run/pipeline.py').read_text(encoding='utf-8').count('\n') <= 160


@pytest.mark.parametrize('document', ['CONTRIBUTING.md', 'README.md', 'docs/adding_a_family.md', 'launch/README.md'])
def test_files_that_documents_name_are_there(document):
  text = (ROOT / document).read_text(encoding='utf-8')
  for name in re.findall(
    r'`((?:elder_jax|tests|benchmarks|run|methods|recipes|training|hf|model|commands)/[\w/]+\.py)`', text
  ):
    assert (ROOT / name).is_file() or (ROOT / 'elder_jax' / name).is_file(), name


def test_nothing_compares_a_methods_or_recipes_name():
  names = 'elder|laco|cosine_block|regularize|absorb|absorb_then_train|prune_then_train|replace_linear'
  compared = re.compile(rf"(==|!=|in \(|in \[|startswith\() *'({names})'")
  for path in FILES:
    if found := compared.search(path.read_text(encoding='utf-8')):
      pytest.fail(f'{path}: {found[0]}')
