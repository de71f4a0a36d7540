"""The package: what setup.py lists, what a wheel holds and does, and how a run ends for which an extra is missing."""

import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import packaging.requirements
import packaging.utils
import pytest
from refusal import refused
from tiny import config_of
import yaml

import elder_jax
from elder_jax import commands
from elder_jax import extras
from elder_jax.commands import export_gguf
from elder_jax.commands import report as report_command
from elder_jax.commands.flags import parse
from elder_jax.errors import InputError
from elder_jax.run import pipeline
from elder_jax.run import series
from elder_jax.run.tracking import TRACKERS

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = 'setup.py pyproject.toml MANIFEST.in README.md CHANGELOG.md CITATION.cff LICENSE elder_jax configs'.split()
OPTIONAL = [*extras.EXTRA_OF, *(tracker.package for tracker in TRACKERS.values()), 'torch']
# As where only the core is installed: neither found nor imported.
BLOCK = f'import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n'


@pytest.fixture
def only_core(monkeypatch):
  for name in OPTIONAL:
    monkeypatch.setitem(sys.modules, name, None)


# ---- setup.py ----


@pytest.fixture
def listed(monkeypatch) -> dict:
  """What setup.py gives to setuptools."""
  given = {}
  monkeypatch.setattr('setuptools.setup', lambda **how: given.update(how))
  monkeypatch.chdir(ROOT)
  runpy.run_path('setup.py')
  return given


def names_of(requirements: list[str]) -> set[str]:
  return {packaging.utils.canonicalize_name(packaging.requirements.Requirement(line).name) for line in requirements}


def test_each_extra_installs_what_is_imported(listed):
  core, found = names_of(listed['install_requires']), listed['extras_require']
  needed = extras.EXTRA_OF | {tracker.package: tracker.extra for tracker in TRACKERS.values()}
  for package, extra in needed.items():
    name = packaging.utils.canonicalize_name(package)
    assert name in names_of(found[extra]) and name not in core, package
  trackers = [names_of(found[tracker.extra]) for tracker in TRACKERS.values()]
  assert names_of(found['track']) == set.union(*trackers)
  assert {'gguf', 'matplotlib', 'mwparserfromhell'} <= names_of(found['demo']) <= names_of(found['test'])
  assert {'cuda', 'tpu'} <= found.keys()


def test_the_versions_agree(listed):
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert listed['version'] == elder_jax.__version__ == citation['version']
  build = tomllib.loads((ROOT / 'pyproject.toml').read_text())['build-system']['requires']
  assert set(build) <= set(listed['extras_require']['test'])  # the wheel test builds without fetching anything
  oldest = listed['python_requires'].removeprefix('>=')
  assert f'Programming Language :: Python :: {oldest}' in listed['classifiers']


# ---- without the extras ----


def test_the_core_alone_imports_every_verb():
  verbs = [module for module, _ in commands.VERBS.values()]
  code = (
    BLOCK
    + f"""
import elder_jax, elder_jax.commands
elder_jax.commands.main(['--help'])
loaded = [name for name in ('jax', 'numpy', 'transformers', 'absl') if name in sys.modules]
assert not loaded, loaded
import importlib
for verb in {verbs}:
  importlib.import_module(f'elder_jax.commands.{{verb}}')
"""
  )
  result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert result.returncode == 0 and 'elder_jax VERB --help' in result.stdout, result.stderr


CASES = {
  'gguf': (dict(model='x.gguf'), '--model=x.gguf: a .gguf file'),
  'a teacher in gguf': (dict(teacher='x.gguf'), '--teacher=x.gguf: a .gguf file'),
  'train on a hub data set': (dict(train_data='own/data:train'), '--train_data=own/data:train: a hub data set'),
  'measure on one': (dict(eval_data=('text=own/data',)), '--eval_data=text=own/data: a hub data set'),
  'parquet': (dict(train_data='x.parquet'), '--train_data=x.parquet: a .parquet file'),
  'zstd': (dict(eval_data=('text=x.jsonl.zst',)), '--eval_data=text=x.jsonl.zst: a .zst file'),
  'tasks': (dict(tasks='piqa'), '--tasks=piqa: zero-shot evaluation'),
  'sweep': (dict(num_remove=None, ratio='0.2,0.4'), '--ratio=0.2,0.4: the plot of this run'),
  'curve': (dict(validate_every=1, validation_sequences=4), '--validate_every=1: the plot of this run'),
}
PACKAGE = {'parquet': 'pyarrow', 'zstd': 'pyarrow', 'tasks': 'lm_eval', 'sweep': 'matplotlib', 'curve': 'matplotlib'}


@pytest.mark.parametrize('case', CASES)
def test_a_run_ends_at_its_start(case, settings, tmp_path, monkeypatch, only_core, no_long_work, no_text):
  changes, sentence = CASES[case]
  monkeypatch.chdir(tmp_path)
  for name in ('x.gguf', 'x.parquet', 'x.jsonl.zst'):
    (tmp_path / name).write_bytes(b'anything')
  package = PACKAGE.get(case) or ('gguf' if 'gguf' in case else 'datasets')
  install = f"needs the package {package}; install it with pip install 'elder_jax[{extras.EXTRA_OF[package]}]'."
  refused(settings, f'{sentence} {install}', **changes)


def test_a_series_ends_before_its_first_run(settings, only_core, no_long_work, no_text):
  """Its first runs measure nothing: they would not find out."""
  changes = dict(num_remove=None, max_ppl_increase=0.1, eval_data=('text=own/data',))
  with pytest.raises(InputError, match=r'eval_data=text=own/data: a hub data set needs .*elder_jax\[data\]'):
    series.run(config_of(**settings | changes))


def test_a_text_that_is_not_read_needs_nothing(settings, only_core):
  cut = dict(remove_layers='2-3', num_remove=None, recipe='none', compare='', eval_data=(), train_data='own/data')
  assert pipeline.run(config_of(**settings | cut))['kept'] == [0, 1, 4, 5]


def test_commands_name_the_extra(tmp_path, monkeypatch, only_core):
  with pytest.raises(InputError, match=r'--png needs the package matplotlib; .*elder_jax\[report\]'):
    report_command.run(parse([report_command.ReportSettings], ['--png', str(tmp_path)]))
  flags = [f'--like={tmp_path}/x.gguf', f'--out={tmp_path}/y.gguf', str(tmp_path)]
  with pytest.raises(InputError, match=r'like=.*: a .gguf file needs the package gguf; .*elder_jax\[gguf\]'):
    export_gguf.run(parse([export_gguf.GgufSettings], flags))


# ---- the wheel ----


@pytest.fixture(scope='module')
def dist(tmp_path_factory) -> pathlib.Path:
  """A folder with the wheel and the source archive, made of nothing but SOURCES."""
  source, made = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
  for name in SOURCES:
    path = ROOT / name
    if path.is_dir():
      shutil.copytree(path, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(path, source)
  _run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', made, source)
  return made


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_configs(dist):
  _run(sys.executable, '-m', 'twine', 'check', '--strict', *sorted(dist.iterdir()))
  with zipfile.ZipFile(next(dist.glob('*.whl'))) as wheel:
    names = set(wheel.namelist())
  for folder in ('elder_jax', 'configs'):
    for path in (ROOT / folder).rglob('*'):
      if path.is_file() and path.suffix != '.pyc':
        name = path.relative_to(ROOT).as_posix()
        assert (name if folder == 'elder_jax' else f'elder_jax/{name}') in names, name
  assert not [name for name in names if name.split('/')[0] not in ('elder_jax', 'elder_jax-0.1.0.dist-info')]


@pytest.mark.slow
def test_an_installed_wheel_prunes_with_the_core_alone(dist, tiny, text, tmp_path):
  """In a virtual environment that has the wheel, and the packages of the tests but for those of extras."""
  environment, empty = tmp_path / 'venv', tmp_path / 'empty'
  venv.create(environment, symlinks=True)
  python = environment / 'bin' / 'python'
  pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-index', '--no-deps']
  _run(*pip, next(dist.glob('*.whl')))
  packages = next(environment.glob('lib/*/site-packages'))
  (packages / 'tests.pth').write_text(sysconfig.get_path('purelib') + '\n')
  (packages / 'sitecustomize.py').write_text(BLOCK)
  empty.mkdir()
  assert str(packages) in _run(python, '-c', 'import elder_jax; print(elder_jax.__file__)', cwd=empty)
  command = environment / 'bin' / 'elder_jax'
  assert _run(command, '--version', cwd=empty) == f'elder_jax {elder_jax.__version__}\n'
  flags = (
    '--num_remove=2 --seq_len=32 --num_sequences=8 --batch_size=4 --eval_seq_len=32 --eval_tokens=256 --score_steps=1'
  )
  flags += f' --train_steps=2 --compare=none --model={tiny} --train_data={text}'
  flags += f' --eval_data=wikipedia={text} --eval_data=news={text} --workdir=runs/x'
  out = _run(command, 'prune', '--config=smollm2_135m_demo', *flags.split(), cwd=empty)
  assert 'absorb, then train (exported) | 4 |' in out
  assert (empty / 'runs/x/export/model.safetensors').is_file()
  assert sorted(path.name for path in empty.iterdir()) == ['runs']
  _run(command, 'verify', 'runs/x/export', cwd=empty)


def _run(*command, cwd=None) -> str:
  """Its stdout."""
  keep = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
  result = subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env=keep | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
  return result.stdout
