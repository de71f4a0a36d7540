"""A command: its flags, its help, and how it ends: with an exit status and one sentence."""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import os
import pathlib
import sys
import textwrap
import traceback

from absl import logging

from elder_jax import errors
from elder_jax.commands.flags import BadFlags
from elder_jax.commands.flags import Parsed
from elder_jax.commands.flags import parse
from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.errors import disk_is_full
from elder_jax.errors import reason
from elder_jax.errors import short
from elder_jax.errors import user_path
from elder_jax.settings import default_of
from elder_jax.settings import fields
from elder_jax.settings import name_of

TRACEBACK = 'ELDER_JAX_TRACEBACK'  # set in the environment: an unexpected error also shows where it came from
HELP = ('-h', '-help', '--h', '--help', '--helpshort', '--helpfull')
WIDTH = 118  # of a line of help


@dataclasses.dataclass(frozen=True)
class Command:
  """run: (what was given) -> an exit status, None is 0. groups: {title: dataclass of settings}."""

  name: str
  summary: str
  run: Callable[[Parsed], int | None]
  groups: dict[str, type] = dataclasses.field(default_factory=dict)
  examples: tuple[str, ...] = ()
  operand: str = ''  # the name of the arguments that are no flags; empty: there are none
  operands: tuple[int, int] = (1, 1)  # least and most of them
  configs: bool = False  # it takes --config
  hidden: tuple[str, ...] = ()

  def main(self, args: list[str]):
    """Runs it and ends the process, unless it ends with status 0."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell their inner life at INFO
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8 is no reason to fail
    try:
      try:
        if status := self._run(args):
          sys.exit(status)
      finally:
        if sys.stdout is not None:
          sys.stdout.flush()  # here, because what fails when the interpreter ends is not caught
    except (Exception, KeyboardInterrupt) as e:  # of any kind: people who run a command get a sentence  # noqa: BLE001
      if isinstance(e, OSError) and not e.filename:  # stdout itself, perhaps: it would fail again at the end
        _drop_output()
      if isinstance(e, BrokenPipeError):
        sys.exit(errors.CLOSED_PIPE)
      fail(*ending(e))

  def _run(self, args: list[str]) -> int | None:
    if asked := next((a for a in args if a in HELP), None):
      print(self.help(full=asked == '--helpfull'))
      return 0
    try:
      parsed = parse(list(self.groups.values()), args)
    except BadFlags as e:
      fail(errors.BAD_INPUT, f'{e} (see --help)')
    least, most = self.operands
    if self.operand and not least <= len(parsed.operands) <= most:
      several = f'{self.operand} and nothing else' if most == 1 else f'at least one {self.operand}'
      fail(errors.BAD_INPUT, f'give one {several} (see --help)' if most == 1 else f'give {several} (see --help)')
    if not self.operand and parsed.operands:
      fail(errors.BAD_INPUT, f'{parsed.operands[0]!r} is no flag: every setting is given as --name=value (see --help)')
    return self.run(parsed)

  def help(self, full: bool = False) -> str:
    """Its flags in groups; full: each with its whole text."""
    usage = (
      f'elder_jax {self.name}'
      + (f' {self.operand}' if self.operand else '')
      + (' [--flag=value …]' if self.groups else '')
    )
    lines = [self.summary, '', f'usage: {usage}', *(f'  {line}' for line in self.examples)]
    for title, kind in self.groups.items():
      if title in self.hidden:
        continue
      shown = [field for field in fields(kind) if full or not field.metadata['rare']]
      lines += ['', f'{title}:', *(_line(field, full) for field in shown)]
      if rare := [f'--{name_of(field)}' for field in fields(kind) if field not in shown]:
        lines += textwrap.wrap(f'also {", ".join(rare)}', WIDTH, initial_indent='  ', subsequent_indent='    ')
    if self.groups:
      lines += ['', f'{"--flagfile=FILE":<30} flags from a file, one on each line']
      if self.configs:
        lines.append(f'{"--config=NAME or FILE":<30} a config that comes with elder_jax, or the config.json of a run')
      lines += [] if full else [f'{"--helpfull":<30} the whole text of each flag']
    return '\n'.join(lines)


def _line(field: dataclasses.Field, full: bool) -> str:
  default = default_of(field)
  name, text = name_of(field), field.metadata['help']
  shown = f'  --[no]{name}' if isinstance(default, bool) else f'  --{name}={as_text(default)}'
  if full:
    choices = ', '.join(c or "''" for c in field.metadata['choices'])
    return f'{shown}\n      {text}' + (f' One of: {choices}.' if choices else '')
  text = text.split('. ')[0].rstrip('.')
  line = f'{shown:<28} {text}'
  return line if len(line) <= WIDTH else f'{line[: WIDTH - 2].rstrip(" ,;:")} …'


def ending(error: BaseException) -> tuple[int, str]:
  """The exit status and the sentence for an exception that ends a command."""
  if isinstance(error, InputError):
    return errors.BAD_INPUT, error.for_command()
  if isinstance(error, KeyboardInterrupt):
    return errors.CTRL_C, 'stopped by Ctrl-C'
  if disk_is_full(error):
    return errors.FAILED, 'the disk is full; free some space and run the command again'
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return (
      errors.DOES_NOT_FIT,
      f'not enough memory ({reason(error)}); use a smaller model, batch or length, or --dtype=bfloat16',
    )
  if isinstance(error, OSError) and error.filename:
    return errors.BAD_INPUT, f'{error.filename}: {error.strerror}; check the path and its permissions'
  if os.environ.get(TRACEBACK):
    traceback.print_exception(error)
  where = ' with '.join(['', *getattr(error, '__notes__', [])])
  fault = f'this is a fault of elder_jax, please report it{where} ({TRACEBACK}=1 shows where)'
  return errors.FAILED, f'{type(error).__name__}: {reason(error)}; {fault}'


def fail(status: int, sentence: str):
  print(f'elder_jax: {short(sentence)}', file=sys.stderr)
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
    raise InputError('out', name, 'is no file, or in no folder that exists; give a file, as in --out=figures.json.')
  tried = path.with_name(f'{path.name}.partial')  # as log.write_whole does later
  try:
    tried.write_bytes(b' ' * 2**16)
    tried.unlink()
  except OSError as e:
    with contextlib.suppress(OSError):
      tried.unlink()
    raise InputError('out', name, f'cannot be written ({e.strerror}); give a file in another folder.') from e
  return path


def _drop_output():
  with contextlib.suppress(OSError, AttributeError):  # no file is behind it
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
