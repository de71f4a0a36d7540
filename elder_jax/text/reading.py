"""Reads one text file: the suffix gives its kind, the first bytes must match it, compression is undone."""

from collections.abc import Iterator
import gzip
import io
import json
import pathlib
from typing import Any

from elder_jax import extras
from elder_jax.errors import InputError
from elder_jax.errors import reason

KINDS = ('.txt', '.md', '.jsonl', '.json', '.parquet')
PACKED = ('.gz', '.zst')
PIECE = 2**20  # bytes per piece of a large text file
_WHOLE = 4 * 2**20  # largest text file, in bytes, that is read as one piece
GIVE = 'give UTF-8 text as .txt, .md or .jsonl, or Parquet as .parquet, each also as .gz or .zst'
_MAGIC = {  # the first bytes of files of other kinds
  b'\x1f\x8b': 'compressed by gzip',
  b'BZh': 'compressed by bzip2',
  b'\xfd7zXZ\0': 'compressed by xz',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd',
  b'PK\x03\x04': 'a zip archive',
  b'PAR1': 'a Parquet file',
  b'%PDF-': 'a PDF',
  b'\xff\xfe\0\0': 'UTF-32',
  b'\xff\xfe': 'UTF-16',
  b'\xfe\xff': 'UTF-16',
}
_MAGIC_OF = {'.gz': b'\x1f\x8b', '.zst': b'\x28\xb5\x2f\xfd', '.parquet': b'PAR1'}


def kind_of(path: pathlib.Path) -> tuple[str, str]:
  """(suffix of its kind, suffix of its compression or '')."""
  suffixes = [s.lower() for s in path.suffixes]
  packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ''
  return suffixes[-1] if suffixes else '', packed


def check_package(flag: str, name: str, path: pathlib.Path):
  """Raises InputError where the package that reads this kind of file is missing."""
  kind, packed = kind_of(path)
  if kind == '.parquet' or packed == '.zst':
    extras.require('pyarrow', f'a {packed or kind} file', flag, name)


def open_file(flag: str, name: str, path: pathlib.Path) -> io.BufferedIOBase:
  """Opens a file and decompresses it. Raises InputError if the first bytes do not match the kind in its name."""
  check_package(flag, name, path)
  kind, packed = kind_of(path)
  try:
    _check_head(flag, name, path, packed or kind)
    if not packed:
      return path.open('rb')
    _check_kind(flag, name, kind)
    if packed == '.gz':
      opened: io.BufferedIOBase = gzip.GzipFile(path)
    else:
      import pyarrow  # not at the top: it is slow to import

      opened = io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'))
    _refuse_head(flag, name, opened.peek(1024)[:1024], kind)
    return opened
  except (OSError, ValueError, EOFError) as e:
    raise InputError(flag, name, f'cannot be read ({reason(e)}); {GIVE}.') from e


def _check_head(flag: str, name: str, path: pathlib.Path, kind: str):
  with path.open('rb') as file:
    head = file.read(1024)
  _refuse_head(flag, name, head, kind)
  if head:
    _check_kind(flag, name, kind)


def _check_kind(flag: str, name: str, kind: str):
  if kind not in (*KINDS, *PACKED):
    raise InputError(flag, name, f'is not of a supported kind; {GIVE}.')


def _refuse_head(flag: str, name: str, head: bytes, kind: str):
  magic = next((magic for magic in _MAGIC if head.startswith(magic)), None)
  if magic == _MAGIC_OF.get(kind):
    what = 'binary data or UTF-16' if magic is None and kind in KINDS[:-1] and b'\0' in head else ''
  else:
    what = _MAGIC[magic] if magic else ''
  if what:
    raise InputError(flag, name, f'is {what}; {GIVE}.')


def pieces(opened: io.BufferedIOBase) -> Iterator[tuple[str, bool]]:
  """Yields (text, whether it is the last piece): a small file whole, a large one in pieces of whole lines."""
  head = opened.read(_WHOLE)
  more = opened.read(1)
  if not more:
    if text := _decoded(head):
      yield text, True
    return
  piece = head + more + opened.readline(PIECE)
  first = True
  while piece:
    following = opened.read(PIECE)
    following += opened.readline(PIECE) if following else b''
    cut = _whole_characters(piece)
    piece, following = piece[:cut], piece[cut:] + following
    yield _decoded(piece) if first else piece.decode(), not following
    piece, first = following, False


def _whole_characters(piece: bytes) -> int:
  """The end of the last whole character, in bytes. A line longer than a piece can be cut inside a character."""
  for back in range(1, min(4, len(piece)) + 1):
    byte = piece[-back]
    if byte >= 0xC0:  # the first byte of a character of 2 to 4 bytes
      size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
      return len(piece) if back >= size else len(piece) - back
    if byte < 0x80:
      break
  return len(piece)


def _decoded(content: bytes) -> str:
  return content.decode('utf-8-sig')  # -sig: drops the byte order mark that some editors write


def json_rows(opened: io.BufferedIOBase) -> Iterator[dict]:
  """Yields the objects of JSON Lines, or of one JSON array, which is read whole. Raises ValueError for other content."""
  text = io.TextIOWrapper(opened, encoding='utf-8-sig', newline='\n')  # a text may contain other line endings
  begun = False
  for number, line in enumerate(text, 1):
    if not line.strip():
      continue
    if not begun and line.lstrip().startswith('['):
      rows = json.loads(line + text.read())
    else:
      rows = [_line(line, number)]
    begun = True
    for row in rows:
      if not isinstance(row, dict):
        raise ValueError('a row is not a JSON object such as {"text": "…"}')
      yield row


def _line(line: str, number: int) -> Any:
  try:
    return json.loads(line)
  except ValueError as e:
    raise ValueError(f'line {number}: {e}') from e


def parquet_rows(opened: io.BufferedIOBase, columns: tuple[str, ...]) -> Iterator[dict]:
  """Yields the rows with those of `columns` that the file has; one row of None for all its columns if it has none."""
  import pyarrow.parquet

  # A compressed file is read whole: its index is at its end, and each seek would decompress it again.
  plain = isinstance(opened, io.BufferedReader) and opened.seekable()
  file = pyarrow.parquet.ParquetFile(opened if plain else io.BytesIO(opened.read()))
  names = file.schema_arrow.names
  wanted = [name for name in columns if name in names]
  if not wanted:
    yield dict.fromkeys(names)
  for batch in file.iter_batches(batch_size=256, columns=wanted) if wanted else ():
    yield from batch.to_pylist()
