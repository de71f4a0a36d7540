"""Documents of a file, a folder, several files by a pattern, or a hub data set: one after another, never all at once."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import fnmatch
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.log import log

KINDS = ('.txt', '.md', '.jsonl', '.json', '.parquet')
PACKED = ('.gz', '.zst')
PIECE = 2**20  # bytes of a large text file that are read together
_WHOLE = 4 * 2**20  # bytes of a text file that is one piece
_GIVE = 'give UTF-8 text as .txt, .md or .jsonl, or Parquet as .parquet, each also as .gz or .zst'
_MAGIC = {  # how files of other kinds begin, whatever they are called
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

CHAT_COLUMNS = ('messages', 'prompt', 'completion')

Message = dict[str, str]  # role, content


class Document(NamedTuple):
  """A text, a conversation, or a piece of a text file too large to be held whole.

  ends: False for a piece that is not its document's last.
  """

  content: str | list[Message]
  ends: bool = True


class Place(NamedTuple):
  """Where a reader goes on: file, document of it."""

  file: int
  document: int


class Documents:
  """The documents of a source. A path is opened as it is: brackets, stars and colons in its folders are no pattern.

  Attributes:
    files: what is read, in order; empty for a hub data set.
    size: bytes of the files, None for a hub data set.
  """

  def __init__(self, flag: str, source: str, column: str):
    """Args:
      flag: what to name in an error, e.g. train_data.
      source: a .txt, .md (a document each), .jsonl, .json or .parquet file, also as .gz or .zst; a folder of files of one
        kind; a folder with a pattern for names, as in texts/*.jsonl.gz; or a hub id as id, id:split or
        id:configuration:split.
      column: of a text or of messages. Without it a row may have `messages`, or `prompt` and `completion`.

    Raises:
      InputError: it cannot be read. A file is opened for that, not read through.
    """
    self.flag, self.source, self.column = flag, source, column
    self._columns = (column, *CHAT_COLUMNS)
    self.files = list_files(flag, source)
    self.size = sum(file.stat().st_size for file in self.files) if self.files else None
    self._hub = None if self.files else _Hub(flag, source)
    for file in self.files:
      _open(self.flag, self._name(file), file).close()

  def read(self, place: Place = Place(0, 0)) -> Iterator[tuple[Document, Place]]:
    """From a place on: each document and the place after it. Raises InputError."""
    if self._hub:
      for i, row in enumerate(self._hub.rows(place.document), place.document + 1):
        if not set(self._columns) & row.keys():
          self._no_column(self.source, list(row))
        if document := self._of_row(row, self.source):
          yield document, Place(0, i)
      return
    for number in range(place.file, len(self.files)):
      file, first = self.files[number], place.document if number == place.file else 0
      for i, document in enumerate(self._of_file(file), 1):
        if i > first and document:
          yield document, Place(number, i)

  def in_order_of_hashes(self):
    """Puts the files in an order that has nothing to do with their names: the beginning is then a sample of the whole."""
    self.files.sort(key=lambda file: hashlib.sha256(file.name.encode()).digest())

  @property
  def revision(self) -> str:
    """Of a hub data set: what was read; it does not change while a run lasts."""
    return self._hub.revision if self._hub else ''

  def _name(self, file: pathlib.Path) -> str:
    """What to call a file in an error."""
    return self.source if user_path(self.source) == file else str(file)

  def _of_file(self, file: pathlib.Path) -> Iterator[Document | None]:
    """None for a row without a text."""
    name = self._name(file)
    if not file.stat().st_size:
      return
    try:
      with _open(self.flag, name, file) as opened:
        kind = kind_of(file)[0]
        if kind in ('.txt', '.md'):
          yield from _pieces(opened)
        else:
          rows = _parquet_rows(opened, self._columns) if kind == '.parquet' else _json_rows(opened)
          yield from self._of_rows(rows, name)
    except InputError:
      raise
    except Exception as e:  # of a damaged file any kind  # noqa: BLE001
      raise InputError(self.flag, name, f'cannot be read ({reason(e)}); {_GIVE}.') from e

  def _of_rows(self, rows: Iterable[dict], name: str) -> Iterator[Document | None]:
    names: dict[str, None] = {}
    for row in rows:
      if len(names) < 20:
        names |= dict.fromkeys(row)
      yield self._of_row(row, name)
    if names and not set(self._columns) & names.keys():
      self._no_column(name, list(names))

  def _no_column(self, name: str, names: list[str]):
    raise InputError(self.flag, name, f'has no column {self.column!r} but {names[:20]}; name it with --text_column.')

  def _of_row(self, row: dict, name: str) -> Document | None:
    value = row.get(self.column)
    if value is None and 'messages' in row:
      value = row['messages']
    elif value is None and row.get('completion') is not None:
      value = [*_turn('user', row.get('prompt')), *_turn('assistant', row['completion'])]
    if value is None:
      return None
    if isinstance(value, str):
      self._check_text(value, name)
      return Document(value)
    if isinstance(value, list) and all(_is_message(m) for m in value):
      for message in value:
        self._check_text(message['content'], name)
      return Document([{key: m[key] for key in ('role', 'content')} for m in value]) if value else None
    raise InputError(
      self.flag, name, f'the column {self.column!r} holds no text and no messages; name another with --text_column.'
    )

  def _check_text(self, text: str, name: str):
    try:
      text.encode()
    except UnicodeEncodeError as e:  # JSON can hold it
      raise InputError(self.flag, name, 'holds half of a surrogate pair, which is no character; remove it.') from e


def _turn(role: str, said) -> list:
  """A prompt or completion, which may be a list of messages itself."""
  return said if isinstance(said, list) else [] if said is None else [{'role': role, 'content': said}]


def _is_message(message: Any) -> bool:
  return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ('role', 'content'))


# ---- which files ----


def kind_of(path: pathlib.Path) -> tuple[str, str]:
  """(suffix of its kind, suffix of its compression or '')."""
  suffixes = [s.lower() for s in path.suffixes]
  packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ''
  return suffixes[-1] if suffixes else '', packed


def list_files(flag: str, source: str, say: Callable[[str], None] = log) -> list[pathlib.Path]:
  """The files of a source by name; none: it is a hub id. Several are said in the log. Raises InputError."""
  path = user_path(source)
  if source and os.path.isdir(path):
    files = _of_folder(flag, source, path)
    _tell(flag, source, files, say)
    return files
  if os.path.isfile(path):  # unlike Path.is_file, False for a name too long or not to be reached
    return [path]
  if ('*' in path.name or '?' in path.name) and os.path.isdir(path.parent):
    names = sorted(name for name in os.listdir(path.parent) if fnmatch.fnmatchcase(name, _pattern(path.name)))
    files = [file for name in names if (file := path.parent / name).is_file() and not name.startswith('.')]
    if files:
      _tell(flag, source, files, say)
      return files
  if kind_of(path)[0] in KINDS:
    raise InputError(flag, source, 'there is no such file; check the path.')
  return []


def _pattern(name: str) -> str:
  return name.replace('[', '[[]')  # fnmatch knows sets, too; here a bracket is a bracket


def _of_folder(flag: str, source: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder, sorted by name; hidden ones do not count."""
  try:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
  except OSError as e:
    raise InputError(flag, source, f'cannot be read ({reason(e)}); check its permissions.') from e
  found = sorted({'folders' if p.is_dir() else kind_of(p)[0] or 'files without a suffix' for p in files})
  if len(found) != 1 or found[0] not in KINDS:
    raise InputError(
      flag,
      source,
      f'a folder must hold {", ".join(KINDS)} files, all of one kind, this one holds '
      f'{", ".join(found[:8]) or "no files"}; give a folder of one kind, or a file.',
    )
  return files


def _tell(flag: str, source: str, files: list[pathlib.Path], say: Callable[[str], None]):
  kind = ''.join(kind_of(files[0]))
  say(f'{flag}={source}: reading {len(files)} {kind} files, {files[0].name} to {files[-1].name}')


# ---- what is in a file ----


def _open(flag: str, name: str, path: pathlib.Path) -> io.BufferedIOBase:
  """The content, unpacked. Raises InputError for a file whose beginning is of another kind than its name says."""
  kind, packed = kind_of(path)
  try:
    _check_head(flag, name, path, packed or kind)
    if not packed:
      return path.open('rb')
    _check_kind(flag, name, kind)
    if packed == '.gz':
      opened: io.BufferedIOBase = gzip.GzipFile(path)
    else:
      import pyarrow  # here: it is slow to import

      opened = io.BufferedReader(pyarrow.input_stream(str(path), compression='zstd'))
    _refuse_head(flag, name, opened.peek(1024)[:1024], kind)
    return opened
  except (OSError, ValueError, EOFError) as e:
    raise InputError(flag, name, f'cannot be read ({reason(e)}); {_GIVE}.') from e


def _check_head(flag: str, name: str, path: pathlib.Path, kind: str):
  with path.open('rb') as file:
    head = file.read(1024)
  _refuse_head(flag, name, head, kind)
  if head:
    _check_kind(flag, name, kind)


def _check_kind(flag: str, name: str, kind: str):
  if kind not in (*KINDS, *PACKED):
    raise InputError(flag, name, f'is of no kind that can be read; {_GIVE}.')


def _refuse_head(flag: str, name: str, head: bytes, kind: str):
  magic = next((magic for magic in _MAGIC if head.startswith(magic)), None)
  if magic == _MAGIC_OF.get(kind):
    what = 'binary data or UTF-16' if magic is None and kind in KINDS[:-1] and b'\0' in head else ''
  else:
    what = _MAGIC[magic] if magic else ''
  if what:
    raise InputError(flag, name, f'is {what}; {_GIVE}.')


def _pieces(opened: io.BufferedIOBase) -> Iterator[Document]:
  """A text file, a document: whole, or where it is large in pieces that end where a line does."""
  head = opened.read(_WHOLE)
  more = opened.read(1)
  if not more:
    if text := _decoded(head):
      yield Document(text)
    return
  piece = head + more + opened.readline(PIECE)
  first = True
  while piece:
    following = opened.read(PIECE)
    following += opened.readline(PIECE) if following else b''
    cut = _whole_characters(piece)
    piece, following = piece[:cut], piece[cut:] + following
    yield Document(_decoded(piece) if first else piece.decode(), ends=not following)
    piece, first = following, False


def _whole_characters(piece: bytes) -> int:
  """Where the last character that is whole ends: a line of more than a piece is cut anywhere."""
  for back in range(1, min(4, len(piece)) + 1):
    octet = piece[-back]
    if octet >= 0xC0:  # begins a character of 2 to 4 octets
      size = 2 if octet < 0xE0 else 3 if octet < 0xF0 else 4
      return len(piece) if back >= size else len(piece) - back
    if octet < 0x80:
      break
  return len(piece)


def _decoded(octets: bytes) -> str:
  return octets.decode('utf-8-sig')  # -sig: without the byte order mark that some editors write


def _json_rows(opened: io.BufferedIOBase) -> Iterator[dict]:
  """The objects of a line each, or of one JSON array, which is read whole."""
  text = io.TextIOWrapper(opened, encoding='utf-8-sig', newline='\n')  # other line ends may stand inside a text
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
        raise ValueError('a row is no JSON object such as {"text": "…"}')
      yield row


def _line(line: str, number: int) -> Any:
  try:
    return json.loads(line)
  except ValueError as e:
    raise ValueError(f'line {number}: {e}') from e


def _parquet_rows(opened: io.BufferedIOBase, columns: tuple[str, ...]) -> Iterator[dict]:
  import pyarrow.parquet

  # The index is at the end: a .zst file is read whole, of a .gz file everything before it is unpacked.
  file = pyarrow.parquet.ParquetFile(opened if opened.seekable() else io.BytesIO(opened.read()))
  names = file.schema_arrow.names
  wanted = [name for name in columns if name in names]
  if not wanted:
    yield dict.fromkeys(names)
  for batch in file.iter_batches(batch_size=256, columns=wanted) if wanted else ():
    yield from batch.to_pylist()


# ---- the hub ----


class _Hub:
  """A hub data set, streamed."""

  def __init__(self, flag: str, source: str):
    self._flag, self._source = flag, source
    self._id, *self._rest = check_hub_id(flag, source)
    self._pinned = ''

  @property
  def revision(self) -> str:
    import huggingface_hub

    if not self._pinned:
      try:
        self._pinned = huggingface_hub.HfApi().dataset_info(self._id).sha
      except Exception as e:  # of many kinds  # noqa: BLE001
        self._refuse(e)
    return self._pinned

  def rows(self, skip: int) -> Iterator[dict]:
    import datasets

    datasets.disable_progress_bars()
    split = self._rest[-1] if self._rest else 'train'
    try:
      rows = datasets.load_dataset(self._id, *self._rest[:-1], split=split, streaming=True, revision=self.revision)
      yield from rows.skip(skip) if skip else rows
    except Exception as e:  # datasets raises many kinds, all mean the same here  # noqa: BLE001
      self._refuse(e)

  def _refuse(self, error: Exception):
    raise InputError(
      self._flag, self._source, f'cannot be read ({reason(error)}); give a .txt, .jsonl or .parquet file or a hub id.'
    ) from error


def check_hub_id(flag: str, source: str) -> list[str]:
  """[id, configuration, split] as far as they are given. Raises InputError for what is no hub id."""
  from datasets import packaged_modules  # here, as above

  hub_id, *rest = source.split(':', 2)
  # `datasets` takes other names for URLs, patterns, local folders, or its own readers, which read the current folder.
  is_id = re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', hub_id) and not os.path.exists(hub_id)
  if not is_id or hub_id in packaged_modules._PACKAGED_DATASETS_MODULES:
    raise InputError(
      flag,
      source,
      'is no file or folder here and no id of a hub data set; give a .txt, .jsonl or .parquet file, a '
      'folder of them, or a hub id as owner/name.',
    )
  return [hub_id, *rest]
