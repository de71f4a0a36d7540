"""Any error ends a command with one sentence and an exit status. Also the help of each command."""

import errno
import importlib
import os
import pathlib
import re
import subprocess
import sys

from ending import one_sentence
import pytest

import elder_jax
from elder_jax import commands
from elder_jax.commands.command import TRACEBACK
from elder_jax.commands.command import Command
from elder_jax.errors import InputError
from elder_jax.run.config import all_fields

REPO = pathlib.Path(__file__).resolve().parents[2]


def raising(error: BaseException) -> Command:
  def run(parsed):
    raise error

  return Command('raising', 'Raises.', run)


# ---- how a command ends ----


@pytest.mark.parametrize(
  'error, status, parts',
  [
    (InputError('x', 1, 'is\nwrong.'), 2, ['--x=1: is\\nwrong.']),
    (InputError('x' * 9000 + ' end.'), 2, ['xxx … xxx', 'end.']),
    (KeyboardInterrupt(), 130, ['stopped by Ctrl-C']),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, ['the disk is full']),
    (ValueError(f'FAILED_PRECONDITION: {os.strerror(errno.ENOSPC)}'), 1, ['the disk is full']),
    (PermissionError(errno.EACCES, 'Permission denied', '/a/b'), 2, ['/a/b: Permission denied']),
    (MemoryError('Unable to allocate 3 TiB'), 3, ['not enough memory (Unable to allocate 3 TiB)']),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory\n(allocator)'), 3, ['not enough memory']),
    (KeyError('acc'), 1, ["KeyError: 'acc'", 'a bug in elder_jax', 'ELDER_JAX_TRACEBACK=1']),
    (RuntimeError('two\nlines'), 1, ['RuntimeError: two lines;', 'report it']),
    (RecursionError(), 1, ['RecursionError: RecursionError']),
  ],
  ids=lambda v: type(v).__name__,
)
def test_any_error_ends_in_one_sentence(command, error, status, parts):
  one_sentence(command(raising(error)), status, *parts)


def test_a_traceback_is_printed_on_request(command, monkeypatch):
  monkeypatch.setenv(TRACEBACK, '1')
  status, _, err = command(raising(KeyError('acc')))
  assert status == 1 and 'in run\n' in err and err.splitlines()[-1].startswith('elder_jax: KeyError')


def process(*args, stdout=subprocess.PIPE):
  env = {**os.environ, 'PYTHONPATH': str(REPO), 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
  command = [sys.executable, '-m', 'elder_jax', *args]
  result = subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
  return result.returncode, (result.stdout or b'').decode(), result.stderr.decode()


def test_a_process_refuses_bytes_that_are_not_utf8():
  one_sentence(process('generate', '--model=x', b'--prompt=caf\xe9'), 2, '--prompt=caf\\udce9: contains bytes')


def test_a_process_with_a_closed_pipe_ends_quietly():
  read, write = os.pipe()
  os.close(read)
  assert process('speed', '--helpfull', stdout=write) == (141, '', '')
  os.close(write)


def test_a_process_whose_output_is_on_a_full_disk():
  with open('/dev/full', 'w') as full:
    one_sentence(process('verify', '--help', stdout=full), 1, 'the disk is full')


HUB_WARNING = """
import logging
import datasets
import huggingface_hub
from elder_jax.commands.command import Command
def warn(parsed):
  for name in ('huggingface_hub.utils', 'datasets.utils'):
    logging.getLogger(name).warning(f'{name}: retrying')
Command('warn', 'Warns.', warn).main([])
"""


def test_a_warning_of_the_hub_is_printed_once():
  env = {**os.environ, 'PYTHONPATH': str(REPO), 'JAX_PLATFORMS': 'cpu'}
  err = subprocess.run([sys.executable, '-c', HUB_WARNING], env=env, capture_output=True, text=True, timeout=120).stderr
  assert err.count('huggingface_hub.utils: retrying') == err.count('datasets.utils: retrying') == 1, err


# ---- help ----


@pytest.mark.parametrize('verb', commands.VERBS)
@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull', '-help'])
def test_help(command, verb, flag):
  status, out, err = command(verb, '--model=x', flag)
  module = importlib.import_module(f'elder_jax.commands.{commands.VERBS[verb][0]}')
  lines = out.splitlines()
  assert (status, err) == (0, '') and lines[0] == module.COMMAND.summary and f'usage: elder_jax {verb}' in out
  assert len(lines) > 3 and 'elder_jax ' in lines[3]  # an example
  if flag != '--helpfull':
    assert len(lines) <= 100 and max(map(len, lines)) <= 120, len(lines)
  for foreign in ('undefok', 'alsologtostderr', 'pdb', 'orbax'):
    assert foreign not in out


def test_help_of_a_process():
  """Imports define absl flags and emit warnings only in a new process."""
  status, out, err = process('prune', '--helpfull')
  assert (status, err) == (0, '') and '--num_remove' in out
  assert not {'undefok', 'alsologtostderr', 'pdb', 'orbax'} & set(re.findall(r'\w+', out))


def test_help_names_every_flag(command):
  short, full = command('prune', '--help')[1], command('prune', '--helpfull')[1]
  for name, field in all_fields().items():
    assert re.search(rf'--(\[no\])?{name}\b', short) and field.metadata['help'] in full, name


def test_the_overview(capsys):
  for args in ([], ['--help'], ['-h'], ['help']):
    commands.main(args)
    out = capsys.readouterr().out
    assert all(f'  {verb}' in out for verb in commands.VERBS) and len(out.splitlines()) < 25
  commands.main(['--version'])
  assert capsys.readouterr().out == f'elder_jax {elder_jax.__version__}\n'


@pytest.mark.parametrize(
  'args, expected',
  [
    (['prun'], 'there is no such verb; did you mean prune?'),
    (['zero_shot'], 'there is no such verb; these are: prune, '),
    (['--model=x'], 'give a verb first, as in elder_jax prune'),
    (['prune', '--num_remov=3'], "there is no such flag ('num_remov'); did you mean --num_remove?"),
    (['heal', '--num_remove=3'], '--num_remove=3: heal removes no layers'),
  ],
)
def test_did_you_mean(args, expected, capsys):
  with pytest.raises(SystemExit) as caught:
    commands.main(args)
  err = capsys.readouterr().err
  assert caught.value.code == 2 and expected in err and err.count('\n') == 1, err


@pytest.mark.parametrize('verb, operand', [('verify', 'FOLDER'), ('report', 'RUN')])
def test_a_command_with_operands(command, verb, operand):
  one_sentence(command(verb), 2, operand)
  one_sentence(command(verb, '/nowhere'), 2, 'there is no such')
  one_sentence(command('verify', 'a', 'b'), 2, 'give exactly one FOLDER')
