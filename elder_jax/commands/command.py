"""A command: its flags, its help, and its ending with an exit status and one sentence."""

from collections.abc import Callable
import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import sys
import textwrap
import traceback

from absl import logging as absl_logging

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

TRACEBACK = 'ELDER_JAX_TRACEBACK'  # environment variable; if set, an unexpected error prints its traceback
HELP = ('-h', '-help', '--h', '--help', '--helpshort', '--helpfull')
WIDTH = 118  # of a line of help, in characters


@dataclasses.dataclass(frozen=True)
class Command:
  """A verb of the command line.

  run: (parsed arguments) -> exit status; None is 0.
  groups: {title: dataclass of settings}.
  operand: name of the positional arguments; '' if there are none.
  operands: least and largest number of positional arguments.
  configs: whether it accepts --config.
  hidden: titles of groups that the help leaves out.
  """

  name: str
  summary: str
  run: Callable[[Parsed], int | None]
  groups: dict[str, type] = dataclasses.field(default_factory=dict)
  examples: tuple[str, ...] = ()
  operand: str = ''
  operands: tuple[int, int] = (1, 1)
  configs: bool = False
  hidden: tuple[str, ...] = ()

  def main(self, args: list[str]):
    """Runs the command. Exits the process unless the status is 0."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax and JAX log internals at INFO
    for name in ('huggingface_hub', 'datasets'):  # their own handlers print already; absl's would repeat each line
      logging.getLogger(name).propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):
      sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8 is no reason to fail
    try:
      try:
        if status := self._run(args):
          sys.exit(status)
      finally:
        if sys.stdout is not None:
          sys.stdout.flush()  # here, because an error at interpreter exit could not be caught
    except (Exception, KeyboardInterrupt) as e:  # every error is reported in one sentence  # noqa: BLE001
      if isinstance(e, OSError) and not e.filename:  # perhaps stdout, which would fail again at exit
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
      count = 'exactly one' if most == 1 else 'at least one'
      fail(errors.BAD_INPUT, f'give {count} {self.operand} (see --help)')
    if not self.operand and parsed.operands:
      fail(errors.BAD_INPUT, f'{parsed.operands[0]!r} is not a flag; give settings as --name=value (see --help)')
    return self.run(parsed)

  def help(self, full: bool = False) -> str:
    """Returns the flags in groups. full: each with its complete text."""
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
      lines += ['', f'{"--flagfile=FILE":<30} reads flags from a file, one per line']
      if self.configs:
        lines.append(f'{"--config=NAME or FILE":<30} reads a built-in config, a flag file, or the config.json of a run')
      lines += [] if full else [f'{"--helpfull":<30} shows the complete text of each flag']
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
  """Returns the exit status and the sentence for an exception that ends a command."""
  if isinstance(error, InputError):
    return errors.BAD_INPUT, error.for_command()
  if isinstance(error, KeyboardInterrupt):
    return errors.CTRL_C, 'stopped by Ctrl-C'
  if disk_is_full(error):
    return errors.FAILED, 'the disk is full; free some space and run the command again'
  if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error):
    return (
      errors.DOES_NOT_FIT,
      f'not enough memory ({reason(error)}); use a smaller model, batch size or length, or --dtype=bfloat16',
    )
  if isinstance(error, OSError) and error.filename:
    return errors.BAD_INPUT, f'{error.filename}: {error.strerror}; check the path and its permissions'
  if os.environ.get(TRACEBACK):
    traceback.print_exception(error)
  where = ' with '.join(['', *getattr(error, '__notes__', [])])
  fault = f'this is a bug in elder_jax, please report it{where} ({TRACEBACK}=1 prints the traceback)'
  return errors.FAILED, f'{type(error).__name__}: {reason(error)}; {fault}'


def fail(status: int, sentence: str):
  """Prints the sentence to stderr and exits with the status."""
  print(f'elder_jax: {short(sentence)}', file=sys.stderr)
  sys.exit(status)


def out_file(name: str) -> pathlib.Path | None:
  """Returns the path of --out, or None if it is not given. Tests by writing that the path is writable.

  Raises:
    InputError: no file can be written there.
  """
  if not name:
    return None
  path = user_path(name)
  if os.path.lexists(path) and not os.path.isfile(path) or not os.path.isdir(path.parent):
    raise InputError('out', name, 'is not a file in an existing folder; give one, as in --out=results.json.')
  tried = path.with_name(f'{path.name}.partial')  # the name that log.write_whole will use
  try:
    tried.write_bytes(b' ' * 2**16)
    tried.unlink()
  except OSError as e:
    with contextlib.suppress(OSError):
      tried.unlink()
    raise InputError('out', name, f'cannot be written ({e.strerror}); give a file in another folder.') from e
  return path


def _drop_output():
  with contextlib.suppress(OSError, AttributeError):  # stdout is not a file
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
