"""benchmarks/ are run by hand and rarely; that they can be imported, and that what they use is there, is seen here."""

import ast
import importlib
import pathlib
import types

from absl import flags
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'benchmarks'
MODULES = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != '__init__')


def missing(module: types.ModuleType, source: str) -> list[str]:
  """Attributes that a module's text takes from our modules and that these have not."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      owner = getattr(module, node.value.id, None)
      ours = isinstance(owner, types.ModuleType) and owner.__name__.startswith(('elder_jax', 'benchmarks'))
      if ours and not hasattr(owner, node.attr):
        found.append(f'{node.value.id}.{node.attr}')
  return found


@pytest.fixture
def no_flags():
  """Benchmarks are commands with flags of the same names; in one process each must find the names free."""
  before = list(flags.FLAGS)
  yield
  for name in set(flags.FLAGS) - set(before):
    delattr(flags.FLAGS, name)


@pytest.mark.usefixtures('no_flags')
@pytest.mark.parametrize('name', MODULES)
def test_what_a_benchmark_uses_is_there(name):
  path = FOLDER / f'{name}.py'
  assert not missing(importlib.import_module(f'benchmarks.{name}'), path.read_text(encoding='utf-8'))


def test_what_is_not_there_is_seen():
  module = importlib.import_module('benchmarks.absorb_rounds')
  assert missing(module, 'results.BUDGET, results.split, results_rows.BUDGET') == ['results.BUDGET']
