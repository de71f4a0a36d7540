"""Errors: bad input reported in one sentence, exit statuses, and how to recognise a full disk."""

import errno
import os
import pathlib

# Exit statuses of the commands. 75 is EX_TEMPFAIL of sysexits.h; 130 and 141 are those that shells use for signals.
FAILED, BAD_INPUT, DOES_NOT_FIT, PREEMPTED, CTRL_C, CLOSED_PIPE = 1, 2, 3, 75, 130, 141


class InputError(Exception):
  """Bad input, reported in one sentence that names the setting, file or tensor and the fix.

  InputError(setting, value, why) is about a setting, which a command prints as --setting=value. InputError(sentence) is
  about anything else. Unprintable characters such as newlines are escaped, because names in damaged files can contain
  any of them.

  Attributes:
    setting, value: None if the error is not about a setting.
    why: the sentence without the setting.
  """

  def __init__(self, setting_or_sentence: str, value=None, why: str = ''):
    self.setting, self.value = (setting_or_sentence, value) if why else (None, None)
    self.why = _printable(why or setting_or_sentence)
    super().__init__(self._written(''))

  def for_command(self) -> str:
    """Returns the sentence with the setting written as a flag."""
    return self._written('--')

  def _written(self, dashes: str) -> str:
    if self.setting is None:
      return self.why
    return _printable(f'{dashes}{self.setting}={as_text(self.value)}: {self.why}')


def as_text(value) -> str:
  """Returns a setting's value as it is written on the command line."""
  if value is None:
    return ''
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, dict):
    return ','.join(f'{name}={of_name}' for name, of_name in value.items())
  return ','.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def short(sentence: str) -> str:
  """Shortens a sentence to one line of at most 1000 characters. Values from flags or files may have thousands."""
  line = _printable(sentence)
  return line if len(line) <= 1000 else f'{line[:500]} … {line[-500:]}'


def _printable(text: str) -> str:
  return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
  """Returns a library's error message in one line of at most 300 characters, for an InputError to quote."""
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    text = f'{error.strerror}: {error.filename}' if error.filename else str(error.strerror)
  elif isinstance(error, KeyError):  # its message is the key alone
    text = f'KeyError: {text}'
  text = ' '.join(text.split()).rstrip('.') or type(error).__name__
  return text if len(text) <= 300 else text[:299] + '…'


def shown(value, most: int = 80) -> str:
  """Returns a value from a file for an InputError to quote, shortened: a config.json may hold a list of thousands."""
  text = repr(value)
  return text if len(text) <= most else f'{text[: most - 1]}…'


def user_path(name: str) -> pathlib.Path:
  """Returns a path with ~ expanded. Unlike Path.expanduser, leaves a ~name that has no home folder unchanged."""
  return pathlib.Path(os.path.expanduser(name))


def cache_folder() -> pathlib.Path:
  """Returns the folder for files that are kept between runs and can be created again."""
  return user_path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'elder_jax'


def disk_is_full(error: BaseException | None) -> bool:
  """Whether a write failed for lack of space or quota. TensorStore reports this only in the text of its own error."""
  full = (errno.ENOSPC, errno.EDQUOT)
  while error is not None:
    if getattr(error, 'errno', None) in full or any(os.strerror(number) in str(error) for number in full):
      return True
    error = error.__cause__ or error.__context__
  return False
