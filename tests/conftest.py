"""Tiny random models and texts shared by all tests. Golden tests need torch and fail without it."""

import mmap
import os
import pathlib
import shutil
import tempfile

if 'PYTEST_XDIST_WORKER' in os.environ:
  os.environ.setdefault('OMP_NUM_THREADS', '1')  # there is one worker per core


def _has(flag: str) -> bool:
  """Whether this jaxlib has an XLA flag. An unknown flag would end the process."""
  import jaxlib

  library = pathlib.Path(jaxlib.__file__).with_name('libjax_common.so')
  with library.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
    return code.find(flag.encode()) >= 0


# Compilation takes half of the tests' time, and half as long without the fusion emitters. Child processes use this too.
_FLAGS = [os.environ.get('XLA_FLAGS', '')]
if _has('xla_cpu_use_fusion_emitters'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
# This process has eight devices. A test uses only the first unless it has the fixture `eight_devices`.
os.environ['XLA_FLAGS'] = ' '.join([*_FLAGS, '--xla_force_host_platform_device_count=8'])

import jax  # noqa: E402

assert len(jax.devices()) == 8
os.environ['XLA_FLAGS'] = ' '.join(_FLAGS)

import pytest
from tiny import write_tiny_llama

from elder_jax.devices import sharding
from elder_jax.hf import table as table_module
from elder_jax.hf.table import rows_of
from elder_jax.run import job
from elder_jax.text import data

jax.config.update('jax_numpy_rank_promotion', 'raise')
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()  # keep the tokens of tests out of the user's cache


def pytest_configure(config):
  os.environ['ELDER_JAX_QUICK'] = str(int('not slow' in (config.option.markexpr or '')))


# The slowest files run first; a worker that got one of them last would run alone at the end.
FIRST = (
  'hf/fuzz hf/smollm2 run/options devices/hosts methods/importance methods/choices text/generate run/signals hf/families '
  'run/memory'
).split()


def pytest_collection_modifyitems(items):
  def place(item) -> int:
    return next((i for i, name in enumerate(FIRST) if f'{name}_test.py' in item.nodeid), len(FIRST))

  items.sort(key=place)


# Compiled programs are cached between runs, in one folder per jax version. Most optimisations are off, since tests run tiny
# programs once. A test that needs them uses the fixture `whole_compiler`.
_CACHE = pathlib.Path(os.environ.get('ELDER_JAX_TEST_CACHE', '~/.cache/elder_jax/tests')).expanduser() / jax.__version__
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(_CACHE))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
jax.config.update('jax_compilation_cache_max_size', 2**31)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Clears the caches: modules share no programs, and thousands of programs exceed the limit of memory mappings."""
  yield
  jax.clear_caches()


_all_devices = sharding.all_devices
sharding.all_devices = lambda: jax.devices()[:1]


@pytest.fixture
def eight_devices(monkeypatch):
  """Makes all eight devices visible to a run."""
  monkeypatch.setattr(sharding, 'all_devices', _all_devices)
  return jax.devices()


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> pathlib.Path:
  """The folder of a tiny Llama. Do not change it."""
  return write_tiny_llama(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> pathlib.Path:
  """A text file of some kilobytes. Do not change it."""
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text(''.join(f'{i} times {i % 7} is {i * (i % 7)}, and {i} is not {i + 1}.\n' for i in range(400)))
  return path


@pytest.fixture
def settings(tiny, text, tmp_path) -> dict:
  """Settings of a whole run that takes seconds."""
  return dict(
    model=str(tiny),
    method='elder',
    recipe='regularize',
    workdir=str(tmp_path / 'work'),
    train_data=str(text),
    eval_data=(f'text={text}',),
    seq_len=32,
    num_sequences=8,
    batch_size=4,
    eval_seq_len=32,
    eval_tokens=256,
    num_remove=2,
    selection='iterative',
    gate_steps=2,
    order='joint',
    protect_first=1,
    protect_last=1,
    train_steps=3,
    lr=1e-3,
    verify='jax',
    prompts='none',
  )


@pytest.fixture
def model(tiny, tmp_path, settings) -> pathlib.Path:
  """A copy of the tiny model that a test may damage; `settings` point to it."""
  folder = tmp_path / 'model'
  shutil.copytree(tiny, folder)
  settings['model'] = str(folder)
  return folder


@pytest.fixture
def no_long_work(monkeypatch):
  """Fails a test that loads weights, or makes a table for the number of layers of a damaged config.json."""
  rows = rows_of

  def few_rows(family, spec, num_layers):
    assert num_layers < 1000, 'num_hidden_layers of config.json was not checked'
    return rows(family, spec, num_layers)

  def seen(*args):
    return pytest.fail('the model was loaded before the bad input was reported')

  monkeypatch.setattr(job, 'load_model', seen)
  monkeypatch.setattr(table_module, 'rows_of', few_rows)


@pytest.fixture
def no_text(monkeypatch):
  """Fails a test that reads text: errors in flags and checkpoint must be reported before that."""
  monkeypatch.setattr(
    data, 'load_tokenizer', lambda name: pytest.fail('text was read before the bad input was reported')
  )


@pytest.fixture
def whole_compiler():
  """Turns on all compiler optimisations, as in a real run."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
