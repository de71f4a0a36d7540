"""SHA256SUMS: what an exported folder held when it was written, in the format of the `sha256sum` command."""

import hashlib
import pathlib
import re

from elder_jax.errors import InputError

NAME = 'SHA256SUMS'


def write(folder: pathlib.Path, known: dict[str, str]):
  """known: {file name: sha256} of files that need not be read for it."""
  paths = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
  names = sorted(path.as_posix() for path in paths if path.name != NAME)
  lines = [f'{known.get(name) or _sha256(folder / name)}  {name}\n' for name in names]
  (folder / NAME).write_text(''.join(lines), encoding='utf-8')


def check(folder: pathlib.Path) -> int:
  """The number of files, all of which are as they were written. Raises InputError for one that is not."""
  try:
    lines = (folder / NAME).read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise InputError(f'{folder}: has no readable {NAME}; was it exported by elder_jax?') from e
  if not lines:
    raise InputError(f'{folder / NAME}: is empty; export the model again.')
  for line in lines:
    entry = re.fullmatch(r'([0-9a-f]{64})  ([^\\]+)', line)
    if not entry or {'', '.', '..'} & set(entry[2].split('/')):
      raise InputError(f'{folder / NAME}: {line[:80]!r} is no hash and file name; export the model again.')
    path = folder / entry[2]
    if not path.is_file():
      raise InputError(f'{path}: is missing; export the model again, or fetch the file.')
    if _sha256(path) != entry[1]:
      raise InputError(f'{path}: is not what was written (sha256 differs); export the model again, or fetch the file.')
  return len(lines)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
