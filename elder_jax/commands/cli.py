"""What all commands share: how flags are read, and how a command ends: with an exit status and one sentence.

    if __name__ == '__main__':
      define_flags()
      cli.run(main)

Flags are absl's. On top of it, a name may have dashes (--num-remove), a single-valued flag given twice with two values is
refused, except that the command line overrides a flag file, and flag files are UTF-8 with or without a byte order mark.
"""

from collections.abc import Callable
import contextlib
import io
import os
import pathlib
import re
import sys
import traceback

from absl import flags
from absl import logging

from elder_jax.errors import InputError
from elder_jax.errors import disk_is_full
from elder_jax.errors import reason
from elder_jax.errors import user_path

TRACEBACK = 'ELDER_JAX_TRACEBACK'  # set in the environment: an unexpected error also shows where it came from
MAX_SENTENCE = 1000  # characters; a value out of a flag or a file may have thousands
HELP = ('h', 'help', 'helpshort', 'helpfull')
# What shells give a command that Ctrl-C ended, and one whose output nobody reads any more.
CTRL_C_STATUS, CLOSED_PIPE_STATUS = 130, 141


def run(main: Callable[[list[str]], None], operand: str = '', argv: list[str] | None = None):
  """Runs main(arguments left after the flags). Whatever it raises ends the process as `ending` says.

  Args:
    operand: as in `parse`.
    argv: sys.argv where it is not given.
  """
  logging.use_absl_handler()
  logging.set_verbosity(logging.WARNING)
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8 is no reason to fail
  try:
    try:
      main(parse(sys.argv if argv is None else argv, operand))
    finally:
      if sys.stdout is not None:
        sys.stdout.flush()  # here, because what fails when the interpreter ends is not caught
  except (Exception, KeyboardInterrupt) as e:  # of any kind: people who run a command get a sentence  # noqa: BLE001
    if isinstance(e, OSError) and not e.filename:  # stdout itself, perhaps: it would fail again at the end
      _drop_output()
    if isinstance(e, BrokenPipeError):
      sys.exit(CLOSED_PIPE_STATUS)
    fail(*ending(e))


def ending(error: BaseException) -> tuple[int, str]:
  """The exit status and the sentence for an exception that ends a command."""
  if isinstance(error, InputError):
    return 2, str(error)
  if isinstance(error, KeyboardInterrupt):
    return CTRL_C_STATUS, 'stopped by Ctrl-C'
  if disk_is_full(error):
    return 1, 'the disk is full; free some space and run the command again'
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return 3, f'not enough memory ({reason(error)}); use a smaller model, batch or length, or --dtype=bfloat16'
  if isinstance(error, OSError) and error.filename:
    return 2, f'{error.filename}: {error.strerror}; check the path and its permissions'
  if os.environ.get(TRACEBACK):
    traceback.print_exception(error)
  return 1, (
    f'{type(error).__name__}: {reason(error)}; this is a fault of elder_jax, please report it ({TRACEBACK}=1 shows where)'
  )


def fail(status: int, sentence: str):
  line = str(InputError(sentence))  # one line, whatever a file's name holds
  if len(line) > MAX_SENTENCE:
    line = f'{line[: MAX_SENTENCE // 2]} … {line[-MAX_SENTENCE // 2 :]}'
  print(f'elder_jax: {line}', file=sys.stderr)
  sys.exit(status)


def out_file(name: str) -> pathlib.Path | None:
  """The path of --out, None where it is not given. A file can be written there, which is tried before any long work.

  Raises:
    InputError.
  """
  if not name:
    return None
  path = user_path(name)
  if os.path.lexists(path) and not os.path.isfile(path) or not os.path.isdir(path.parent):
    raise InputError(f'--out={name}: is no file, or in no folder that exists; give a file, as in --out=figures.json.')
  tried = path.with_name(f'{path.name}.partial')  # as metrics.write_whole does later
  try:
    tried.write_bytes(b' ' * 2**16)
    tried.unlink()
  except OSError as e:
    with contextlib.suppress(OSError):
      tried.unlink()
    raise InputError(f'--out={name}: cannot be written ({e.strerror}); give a file in another folder.') from e
  return path


def _drop_output():
  with contextlib.suppress(OSError, AttributeError):  # no file is behind it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- flags ----


def parse(argv: list[str], operand: str = '') -> list[str]:
  """absl's parser with our exit statuses: 2 for bad flags, in one sentence; 0 for help, on stdout.

  Args:
    operand: the name of the one argument that is no flag; empty: there is none.
  """
  try:
    rest = flags.FLAGS([argv[0], *_arguments(argv[1:])], known_only=False)
  except (flags.Error, ValueError) as e:  # ValueError: a value for --noflag
    fail(2, f'{" ".join(str(e).split())} (see --helpfull)')
  if operand and len(rest) != 2:
    fail(2, f'give one {operand}, and nothing else (see --help)')
  if not operand and len(rest) > 1:
    fail(2, f'{rest[1]!r} is no flag: every setting is given as --name=value (see --helpfull)')
  return rest


def _arguments(args: list[str], file: str = '', above: tuple = ()) -> list[str]:
  """The arguments in the one form --name=value, flag files replaced by what they hold.

  Args:
    file: where they come from; empty: the command line.
    above: the paths of the files that include this one, and its own.
  """
  found, given, rest = [], {}, iter(args)
  for arg in rest:
    if arg == '--':
      return [*found, arg, *rest]
    match = re.fullmatch(r'--?([^=-][^=]*)(?:=(.*))?', arg, re.DOTALL)
    name, value = (match[1].replace('-', '_'), match[2]) if match else ('', None)
    if name in HELP:
      _print_help(full=name == 'helpfull')
      sys.exit(0)
    flag, negated = _flag(name), _flag(re.sub('^no_?', '', name))
    if flag is None and value is None and negated is not None and negated.boolean:
      flag, value = negated, 'false'
    if value is None and flag is not None and flag.boolean:
      value = 'true'
    elif value is None and (flag is not None or name == 'flagfile') and (value := next(rest, None)) is None:
      raise flags.Error(f'Missing value for flag {arg}')
    if not (text := f'--{name}={value}' if value is not None else arg).isascii() and re.search('[\ud800-\udfff]', text):
      raise flags.Error(f'{text[:100]}: holds bytes that are not UTF-8; give it in UTF-8')
    if name == 'flagfile':
      found += _flag_file(value, above) if value else []
    elif flag is None:
      found.append(arg)  # an operand, or what absl knows or refuses
    else:
      if not isinstance(flag, flags.MultiFlag) and (before := given.setdefault(flag.name, value)) != value:
        where = f' in {file}' if file else ''
        raise flags.Error(f'--{flag.name}: is given twice{where}, as {before[:80]!r} and {value[:80]!r}; give it once')
      found.append(f'--{flag.name}={value}')
  return found


def _flag(name: str) -> flags.Flag | None:
  return flags.FLAGS[name] if name in flags.FLAGS else None  # FlagValues has no get  # noqa: SIM401


def _flag_file(name: str, above: tuple) -> list[str]:
  path = user_path(name.strip())
  if path in above:
    raise flags.Error(f'--flagfile={name}: includes itself; remove that line')
  try:
    text = path.read_text(encoding='utf-8-sig')
  except OSError as e:
    raise flags.Error(f'--flagfile={name}: cannot be read ({e.strerror}); check the path') from e
  except UnicodeDecodeError:
    text = '\0'
  if '\0' in text:
    raise flags.Error(f'--flagfile={name}: is not a UTF-8 text file; give one with a flag on each line')
  lines = [line.strip() for line in text.split('\n')]
  return _arguments([l for l in lines if l and not l.startswith(('#', '//'))], name, (*above, path))


def _print_help(full: bool):
  """The command's own flags; full: those of the libraries as well."""
  print(sys.modules['__main__'].__doc__ or '')
  print(flags.FLAGS.get_help() if full else flags.FLAGS.module_help('elder_jax'))
  if not full:
    print('Try --helpfull to get a list of all flags.')
