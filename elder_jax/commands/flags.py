"""Parses the flags of all commands: from dataclasses of settings to their values. Uses absl, but hides absl's own flags.

In addition to absl:
  A name may contain dashes (--num-remove).
  A flag with a single value must not be given twice with different values, but the command line overrides a file.
  Flag files are UTF-8, with or without a byte order mark.
  --config accepts the name of a built-in config, a flag file, or the config.json of a run.
"""

import dataclasses
import decimal
import difflib
import json
import pathlib
import re

from absl import flags

from elder_jax.errors import as_text
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.run.config import settings_of_json
from elder_jax.run.removal_settings import HOW_MUCH
from elder_jax.settings import default_of
from elder_jax.settings import fields
from elder_jax.settings import name_of
from elder_jax.settings import types_of

CONFIGS = (pathlib.Path(__file__).parent.parent / 'configs', pathlib.Path(__file__).parent.parent.parent / 'configs')


class BadFlags(Exception):
  """The arguments are wrong; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Parsed:
  """The parsed arguments of a command."""

  settings: dict  # only those that were given
  operands: list[str]
  note: str = ''  # which flags were overridden; one line each
  typed: frozenset[str] = frozenset()  # names of settings that were given on the command line, not in a file


def parse(kinds: list[type], args: list[str]) -> Parsed:
  """Parses arguments into the settings of these dataclasses, by their external names.

  Raises:
    BadFlags: an unknown flag, or a bad value or file.
  """
  values = flags.FlagValues()
  for field in [field for kind in kinds for field in fields(kind)]:
    _define(values, field)
  try:
    arguments = _Arguments(values)
    rest = values(['elder_jax', *arguments.of(args)], known_only=False)[1:]
  except flags.UnrecognizedFlagError as e:
    raise BadFlags(_unknown(values, e)) from e
  except (flags.Error, ValueError) as e:  # ValueError: a value for --noflag
    raise BadFlags(' '.join(str(e).split())) from e
  flags_of = [values[name] for name in values]
  given = {flag.name: flag.value for flag in flags_of if flag.present and (flag.boolean or isinstance(flag, _Setting))}
  own = [flag for flag in flags_of if isinstance(flag, _Setting)]
  dropped = [line for flag in own for line in flag.dropped]
  replaced = [line for flag in own if flag.present for line in flag.replaced]
  notes = []
  if replaced:
    winner = next(name for name in HOW_MUCH if name in given)
    notes.append(f'not used: {", ".join(replaced)}, because --{winner}={as_text(given[winner])} was given later')
  if dropped:
    notes.append(f'not used: {", ".join(dropped)}, because later flags replace them')
  return Parsed(given, rest, '\n'.join(notes), frozenset(arguments.typed))


def _unknown(values: flags.FlagValues, error: flags.UnrecognizedFlagError) -> str:
  near = difflib.get_close_matches(error.flagname.replace('-', '_'), list(values), n=3)
  hint = f'; did you mean {" or ".join(f"--{name}" for name in near)}?' if near else ''
  return f'--{error.flagname}: there is no such flag ({error.flagname!r}){hint}'


# ---- a single flag ----


def _define(values: flags.FlagValues, field: dataclasses.Field):
  name, help_text = name_of(field), field.metadata['help']
  if bool in types_of(field):
    flags.DEFINE_boolean(name, bool(default_of(field)), help_text, flag_values=values)
  else:
    flags.DEFINE_flag(_Setting(values, field), flag_values=values)


class _Parser(flags.ArgumentParser):
  """Converts text to the value of a setting."""

  def __init__(self, field: dataclasses.Field):
    self._field = field

  def parse(self, argument):
    return value_of(self._field, argument)


class _Setting(flags.Flag):
  """The flag of a setting. Among the flags of HOW_MUCH, the last one given replaces the others."""

  def __init__(self, values: flags.FlagValues, field: dataclasses.Field):
    self._repeats = isinstance(default_of(field), dict)  # values of files and of the command line add up
    self._lists = field.metadata['repeats']  # values add up, but the command line's replace a file's
    super().__init__(_Parser(field), flags.ArgumentSerializer(), name_of(field), None, field.metadata['help'])
    self._values, self.value = values, None
    self.replaced: list[str] = []
    self.dropped: list[str] = []

  def parse(self, argument):
    before = self.value if self.present else None
    if self.name in HOW_MUCH:
      self._replace_others()
    super().parse(argument)
    if self._repeats:
      self._merge(dict(before or {}), argument)
    elif self._lists and argument:
      self.value = (before or ()) + self.value

  def _replace_others(self):
    for other in (self._values[name] for name in HOW_MUCH if name in self._values and name != self.name):
      if other.present:
        self.replaced.append(f'--{other.name}={as_text(other.value)}')
        other.unparse()

  def _merge(self, before: dict, argument: str):
    """Adds to the values given before. An empty argument drops them."""
    gone = before if not argument else {k: v for k, v in before.items() if k in self.value and self.value[k] != v}
    self.dropped += [f'--{self.name}={name}={source}' for name, source in gone.items()]
    self.value = (before if argument else {}) | self.value


def value_of(field: dataclasses.Field, text: str):
  """Converts a setting's text on the command line to its value.

  Raises:
    ValueError: the message is what the value must be, in a few words.
  """
  kind = types_of(field)[0]
  if field.metadata['repeats']:
    return (text,) if text else ()
  if getattr(kind, '__origin__', None) is tuple:
    inner = kind.__args__[0]
    text = text.replace(':', ',') if field.metadata['colon'] else text
    parts = [part.strip() for part in text.split(',') if part.strip()]
    return tuple(value for part in parts for value in (_range(part) if inner is int else [_scalar(inner, part)]))
  if getattr(kind, '__origin__', None) is dict:
    name, found, source = text.partition('=')
    if text and not (name and found and source):
      raise ValueError('must be name=source, as in --eval_data=news=news.txt')
    return {name: source} if text else {}
  return _scalar(kind, text)


def _scalar(kind: type, text: str):
  if kind is str:
    return text
  what = 'whole numbers' if kind is int else 'numbers'
  if kind is int and (match := re.fullmatch(r'(\d+\.?\d*)([kMB])', text, re.ASCII)):  # 20M
    text = str(round(float(match[1]) * {'k': 1e3, 'M': 1e6, 'B': 1e9}[match[2]]))
  if kind is float and (match := re.fullmatch(r'(\d+\.?\d*)%', text, re.ASCII)):  # 10%
    text = str(decimal.Decimal(match[1]) / 100)
  try:
    return kind(text if text.isascii() else 'x')
  except ValueError as e:  # also raised for thousands of digits
    raise ValueError(f'must be {what}, separated by commas') from e


def _range(part: str) -> list[int]:
  """Parses a single number or a range such as 12-18."""
  if match := re.fullmatch(r'(\d{1,9})-(\d{1,9})', part, re.ASCII):
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + 100_000:
      raise ValueError(f'{part} is not a range; give the lower number first')
    return list(range(first, last + 1))
  return [_scalar(int, part)]


# ---- arguments and files ----


class _Arguments:
  """Normalises arguments to --name=value and replaces files by their contents."""

  def __init__(self, values: flags.FlagValues):
    self._values = values
    self.typed: set[str] = set()

  def of(self, args: list[str], file: str = '', above: tuple = ()) -> list[str]:
    """Returns the normalised arguments.

    Args:
      file: the file that they come from; '' for the command line.
      above: paths of the files that include it, its own path last.
    """
    found, given, operands, rest = [], {}, [], iter(args)
    for arg in rest:
      if arg == '--':
        operands = [arg, *rest]
        break
      match = re.fullmatch(r'--?([^=-][^=]*)(?:=(.*))?', arg, re.DOTALL)
      name, value = (match[1].replace('-', '_'), match[2]) if match else ('', None)
      flag, value = self._flag_and_value(name, value, arg, rest)
      text = f'--{name}={value}' if value is not None else arg
      if not text.isascii() and re.search('[\ud800-\udfff]', text):
        raise flags.Error(f'{text[:100]}: contains bytes that are not UTF-8; encode it in UTF-8')
      if name in ('flagfile', 'config'):
        found += [(arg, True) for arg in self._file(name, value, above)] if value else []
      elif flag is None:
        found.append((arg, False))  # an operand, or a flag that absl refuses
      else:
        before = given.setdefault(flag.name, value)
        if before != value and not (getattr(flag, '_repeats', False) or getattr(flag, '_lists', False)):
          where = f' in {file}' if file else ''
          raise flags.Error(
            f'--{flag.name}: is given twice{where}, as {before[:80]!r} and {value[:80]!r}; give it only once'
          )
        found.append((f'--{flag.name}={value}', False))
        self.typed |= set() if file else {flag.name}
    own = tuple(f'--{name}=' for name in given if getattr(self._flag(name), '_lists', False))
    return [arg for arg, of_file in found if not (of_file and arg.startswith(own))] + operands

  def _flag_and_value(self, name: str, value: str | None, arg: str, rest):
    """Returns (the flag or None, its value, which may be the next argument)."""
    flag, negated = self._flag(name), self._flag(re.sub('^no_?', '', name))
    if flag is None and value is None and negated is not None and negated.boolean:
      flag, value = negated, 'false'
    if value is None and flag is not None and flag.boolean:
      value = 'true'
    elif value is None and (flag is not None or name in ('flagfile', 'config')) and (value := next(rest, None)) is None:
      raise flags.Error(f'Missing value for flag {arg}')
    return flag, value

  def _flag(self, name: str) -> flags.Flag | None:
    return self._values[name] if name in self._values else None  # FlagValues has no get  # noqa: SIM401

  def _file(self, flag: str, name: str, above: tuple) -> list[str]:
    path = _path_of(flag, name.strip(), above)
    if path in above:
      raise flags.Error(f'--{flag}={name}: includes itself; remove that line')
    try:
      text = path.read_text(encoding='utf-8-sig')
    except OSError as e:
      raise flags.Error(f'--{flag}={name}: cannot be read ({e.strerror}); check the path') from e
    except UnicodeDecodeError:
      text = '\0'
    if '\0' in text:
      raise flags.Error(f'--{flag}={name}: is not a UTF-8 text file; give one with one flag per line')
    if flag == 'config' and path.suffix == '.json':
      return _of_json(name, text)
    lines = [line.strip() for line in text.split('\n')]
    return self.of([l for l in lines if l and not l.startswith(('#', '//'))], name, (*above, path))


def _path_of(flag: str, name: str, above: tuple) -> pathlib.Path:
  """Finds a file, also next to the file that includes it. --config accepts the name of a built-in config as well."""
  path = user_path(name)
  if above and not path.is_file() and (beside := above[-1].parent / name).is_file():
    return beside
  if flag == 'config' and not path.is_file():
    names = {p.stem: p for folder in CONFIGS if folder.is_dir() for p in sorted(folder.glob('[!_]*.flags'))}
    if name in names:
      return names[name]
    near = difflib.get_close_matches(name, list(names), n=2)
    hint = f'did you mean {" or ".join(near)}?' if near else f'the built-in configs are: {", ".join(names)}'
    raise flags.Error(f'--config={name}: is neither a file nor a built-in config; {hint}')
  return path


def _of_json(name: str, text: str) -> list[str]:
  """Returns the flags of a run's config.json."""
  try:
    settings = settings_of_json(json.loads(text))
  except (ValueError, AttributeError, TypeError, RecursionError) as e:
    raise flags.Error(
      f'--config={name}: is not the config.json of a run ({reason(e)}); give one from a work folder'
    ) from e
  found = []
  for key, value in settings.items():
    if isinstance(value, dict):
      found += [f'--{key}={k}={v}' for k, v in value.items()]
    elif key == 'train_data':
      found += [f'--{key}={v}' for v in value]
    elif value is not None:
      found.append(f'--{key}={as_text(value)}')
  return found
