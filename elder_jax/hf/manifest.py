"""SHA256SUMS: the files of an exported folder when it was written, in the format of the `sha256sum` command.

The model card is not listed: people edit it, and so does the hub. Earlier versions did list it.
"""

from collections.abc import Callable
import hashlib
import pathlib
import re

from elder_jax.errors import InputError
from elder_jax.log import log

NAME, CARD = 'SHA256SUMS', 'README.md'


def write(folder: pathlib.Path, known: dict[str, str]):
  """Writes the list.

  Args:
    known: {file name: sha256} of files whose hash is known, which are not read again.
  """
  paths = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
  names = sorted(path.as_posix() for path in paths if path.name != NAME and path.as_posix() != CARD)
  lines = [f'{known.get(name) or _sha256(folder / name)}  {name}\n' for name in names]
  (folder / NAME).write_text(''.join(lines), encoding='utf-8')


def check(folder: pathlib.Path, note: Callable[[str], None] = log) -> int:
  """Returns the number of files, each of which is as it was written.

  Args:
    note: called with a sentence about a model card that an earlier version listed and that changed since.

  Raises:
    InputError: the list cannot be read, or a file is missing or differs.
  """
  listed, changed = entries(folder), 0
  for name, sha256 in listed.items():
    path = folder / name
    same = path.is_file() and _sha256(path) == sha256
    if name == CARD and not same:
      note(f'{path}: was edited or removed since the export; the model itself is not affected')
      changed = 1
    elif not path.is_file():
      raise InputError(f'{path}: is missing; export the model again, or fetch the file.')
    elif not same:
      raise InputError(f'{path}: is not what was written (sha256 differs); export the model again, or fetch the file.')
  return len(listed) - changed


def entries(folder: pathlib.Path) -> dict[str, str]:
  """{file name: sha256} as listed. Raises InputError for a list that is missing or damaged."""
  try:
    lines = (folder / NAME).read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f'{folder}: has no readable {NAME}; was it exported by elder_jax?') from e
  if not lines:
    raise InputError(f'{folder / NAME}: is empty; export the model again.')
  listed = {}
  for line in lines:
    entry = re.fullmatch(r'([0-9a-f]{64})  ([^\\]+)', line)
    if not entry or {'', '.', '..'} & set(entry[2].split('/')):
      raise InputError(f'{folder / NAME}: {line[:80]!r} is no hash and file name; export the model again.')
    listed[entry[2]] = entry[1]
  return listed


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
