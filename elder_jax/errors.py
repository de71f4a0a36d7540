"""The one exception that a user's own input can cause, and how a full disk is told from other failures."""

import errno
import os
import pathlib


class InputError(Exception):
  """Bad input, told in one sentence that names the flag, file or tensor and the mend.

  `main` prints it without a traceback and leaves with exit status 2. Names out of damaged files can hold anything: what
  does not print, a newline say, is escaped.
  """

  def __init__(self, message: str):
    super().__init__(''.join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def reason(error: BaseException) -> str:
  """What a library said, in one line of at most 300 characters that an InputError can quote."""
  text = str(error)
  if isinstance(error, OSError) and error.strerror:
    text = f'{error.strerror}: {error.filename}' if error.filename else str(error.strerror)
  elif isinstance(error, KeyError):  # says the key and nothing else
    text = f'KeyError: {text}'
  text = ' '.join(text.split()).rstrip('.') or type(error).__name__
  return text if len(text) <= 300 else text[:299] + '…'


def shown(value, most: int = 80) -> str:
  """A value out of a file as an InputError can quote it: a config.json may hold a list of thousands."""
  text = repr(value)
  return text if len(text) <= most else f'{text[: most - 1]}…'


def user_path(name: str) -> pathlib.Path:
  """A path as the user typed it; unlike Path.expanduser, a ~name that is nobody's home stays as it is."""
  return pathlib.Path(os.path.expanduser(name))


def disk_is_full(error: BaseException | None) -> bool:
  """Whether a write failed for want of space or quota. TensorStore says so in its own error's text only."""
  full = (errno.ENOSPC, errno.EDQUOT)
  while error is not None:
    if getattr(error, 'errno', None) in full or any(os.strerror(number) in str(error) for number in full):
      return True
    error = error.__cause__ or error.__context__
  return False
