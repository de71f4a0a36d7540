"""benchmarks/ are run by hand and rarely; that they can be imported, and that what they use is there, is seen here."""

import ast
import importlib
import importlib.util
import pathlib
import re
import types

from absl import flags
import pytest

from elder_jax.commands import VERBS

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'benchmarks'
MODULES = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != '__init__')
OURS = ('elder_jax', 'benchmarks', 'tests')
_COMMAND = re.compile(r'-m (elder_jax|benchmarks)((?:\.\w+)*)(?: ([a-z]\w*))?')


def is_ours(name: str) -> bool:
  return name.partition('.')[0] in OURS


def is_there(name: str) -> bool:
  """Whether there is a module of this dotted name."""
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:  # of a folder on the way
    return False


def missing(module: types.ModuleType, source: str) -> list[str]:
  """What a module's text takes from our modules and these have not, wherever in it, and modules that it runs by name."""
  tree, found = ast.parse(source), []
  names = dict(vars(module))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and is_ours(node.module or ''):
      found += _missing_imports(node, names)
    elif isinstance(node, ast.Import):
      found += [name.name for name in node.names if is_ours(name.name) and not is_there(name.name)]
    elif isinstance(node, ast.Constant) and re.fullmatch(r'elder_jax(\.\w+)+', str(node.value)):
      found += [] if is_there(node.value) else [node.value]
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and (owner := _module(node.value, names)) and not hasattr(owner, node.attr):
      found.append(ast.unparse(node))
  for package, path, verb in _COMMAND.findall(source):
    found += [] if is_there(package + path) else [package + path]
    found += [verb] if package + path == 'elder_jax' and verb not in VERBS else []
  return found


def _missing_imports(node: ast.ImportFrom, names: dict) -> list[str]:
  """Of `from module import a, b`; those that are there are put into `names`."""
  if not is_there(node.module):
    return [node.module]
  found, owner = [], importlib.import_module(node.module)
  for name in node.names:
    if hasattr(owner, name.name):
      names.setdefault(name.asname or name.name, getattr(owner, name.name))
    elif is_there(f'{node.module}.{name.name}'):
      names.setdefault(name.asname or name.name, importlib.import_module(f'{node.module}.{name.name}'))
    else:
      found.append(f'{node.module}.{name.name}')
  return found


def _module(node: ast.expr, names: dict) -> types.ModuleType | None:
  """The module of ours that `name` or `name.name` stands for."""
  if isinstance(node, ast.Name):
    owner = names.get(node.id)
  elif isinstance(node, ast.Attribute) and (parent := _module(node.value, names)):
    owner = getattr(parent, node.attr, None)
  else:
    return None
  return owner if isinstance(owner, types.ModuleType) and is_ours(owner.__name__) else None


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


def test_what_the_script_of_the_versions_uses_is_there():
  source = (ROOT / 'tests' / 'transformers_versions.py').read_text(encoding='utf-8')
  assert not missing(types.ModuleType('transformers_versions'), source)


@pytest.mark.usefixtures('no_flags')
@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ('results.BUDGET, results.split, results_rows.BUDGET', ['results.BUDGET']),
    ('from elder_jax.run import plan\nplan.topology, plan.nothing', ['plan.nothing']),
    ('def f():\n  from elder_jax.text.zero_shot import TASKS, NONE', ['elder_jax.text.zero_shot.NONE']),
    ('def f():\n  from elder_jax.gates import learn', ['elder_jax.gates']),
    ('import elder_jax.run.pipeline, elder_jax.pipeline', ['elder_jax.pipeline']),
    ('from elder_jax import run\nrun.config.Config, run.config.Gone', ['run.config.Gone']),
    ("['-m', 'elder_jax.main'], ['-m', 'elder_jax.verify']", ['elder_jax.verify']),
    (
      '"python -m elder_jax verify X, python -m elder_jax gates, python -m benchmarks.none"',
      ['gates', 'benchmarks.none'],
    ),
  ],
)
def test_what_is_not_there_is_seen(source, expected):
  assert missing(importlib.import_module('benchmarks.absorb_variants'), source) == expected


@pytest.mark.usefixtures('no_flags')
def test_a_last_word_is_asked_for_where_the_sentences_before_have_it():
  last_words = importlib.import_module('benchmarks.tasks').last_words
  four = 'The fire came near Gunning. Crews slept. "It was loud." They left at 4.30 today.'
  asked = {'passage': f'{four} The road is closed at', 'word': 'Gunning'}
  assert last_words(f'{four} The road is closed at Gunning.\n') == [asked]
  # Not there before, said in the same sentence, short, or with too few sentences before.
  for last in ('The road to Sydney is closed.', 'Gunning is near Gunning.', 'Who came near?', 'They left at 4.30.'):
    assert not [row for row in last_words(f'{four} {last}') if row['word'] != 'near'], last
  assert not last_words('The fire came near Gunning. They left Gunning.')
