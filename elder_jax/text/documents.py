"""Streams the documents of a file, a folder, a file pattern, or a hub data set; never holds all of them in memory."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import fnmatch
import hashlib
import itertools
import os
import pathlib
from typing import Any, NamedTuple

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.log import log
from elder_jax.text import hub
from elder_jax.text import reading

CHAT_COLUMNS = ('messages', 'prompt', 'completion')

Message = dict[str, str]  # role, content


class Document(NamedTuple):
  """A text, a conversation, or a piece of a text file that is too large to hold in memory.

  ends: False for a piece that is not its document's last.
  """

  content: str | list[Message]
  ends: bool = True


class Place(NamedTuple):
  """Where a reader resumes: index of the file, number of documents of it already read."""

  file: int
  document: int


class Documents:
  """The documents of a source. Folder names are literal: brackets, stars and colons in them are not patterns.

  Attributes:
    files: the files in reading order; empty for a hub data set.
    size: bytes of text in the files, estimated for compressed files and Parquet; None for a hub data set.
  """

  def __init__(self, flag: str, source: str, column: str):
    """Opens the source.

    Args:
      flag: the setting named in errors, e.g. train_data.
      source: a .txt or .md file (one document each), a .jsonl, .json or .parquet file, also as .gz or .zst; a folder of
        files of one kind; a folder with a name pattern, as in texts/*.jsonl.gz; or a hub id (hub.check_hub_id).
      column: holds a text or messages. Rows without it may have `messages`, or `prompt` and `completion`.

    Raises:
      InputError: a file cannot be opened, or the hub id is invalid. The contents are not read yet.
    """
    self.flag, self.source, self.column = flag, source, column
    self._columns = (column, *CHAT_COLUMNS)
    self.files = list_files(flag, source)
    self.size = sum(map(_text_bytes, self.files)) if self.files else None
    self._hub = None if self.files else hub.Hub(flag, source)
    for file in self.files:
      reading.open_file(self.flag, self._name(file), file).close()

  def read(self, place: Place = Place(0, 0)) -> Iterator[tuple[Document, Place]]:
    """Yields each document from `place` on, with the place after it. Raises InputError for content it cannot read."""
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

  def in_order_of_hashes(self, seed: int):
    """Sorts the files by a hash of their names, so that the first ones are a random sample of all."""
    self.files.sort(key=lambda file: hashlib.sha256(f'{seed}{file.name}'.encode()).digest())

  @property
  def revision(self) -> str:
    """The commit of a hub data set, fixed for the whole run; '' for files."""
    return self._hub.revision if self._hub else ''

  def _name(self, file: pathlib.Path) -> str:
    """The name of a file in errors."""
    return self.source if user_path(self.source) == file else str(file)

  def _of_file(self, file: pathlib.Path) -> Iterator[Document | None]:
    """Yields the documents of a file; None for a row without a text."""
    name = self._name(file)
    if not file.stat().st_size:
      return
    try:
      with reading.open_file(self.flag, name, file) as opened:
        kind = reading.kind_of(file)[0]
        if kind in ('.txt', '.md'):
          yield from itertools.starmap(Document, reading.pieces(opened))
        else:
          rows = reading.parquet_rows(opened, self._columns) if kind == '.parquet' else reading.json_rows(opened)
          yield from self._of_rows(rows, name)
    except InputError:
      raise
    except Exception as e:  # a damaged file can raise any type  # noqa: BLE001
      raise InputError(self.flag, name, f'cannot be read ({reason(e)}); {reading.GIVE}.') from e

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
    except UnicodeEncodeError as e:  # JSON allows an unpaired surrogate
      raise InputError(self.flag, name, 'holds an unpaired surrogate, which is not a character; remove it.') from e


def _turn(role: str, said) -> list:
  """A prompt or completion as messages; it may already be a list of messages."""
  return said if isinstance(said, list) else [] if said is None else [{'role': role, 'content': said}]


def _is_message(message: Any) -> bool:
  return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ('role', 'content'))


def _text_bytes(file: pathlib.Path) -> int:
  kind, packed = reading.kind_of(file)
  return file.stat().st_size * (4 if packed or kind == '.parquet' else 1)


# ---- which files ----


def list_files(flag: str, source: str, say: Callable[[str], None] = log) -> list[pathlib.Path]:
  """The files of a source, sorted by name; empty for a hub id.

  Args:
    flag: the setting named in errors.
    source: as in Documents.
    say: logs which files are read, if there are several.

  Raises:
    InputError: the file does not exist, or the folder does not hold files of one kind.
  """
  path = user_path(source)
  if source and os.path.isdir(path):
    files = _of_folder(flag, source, path)
    _tell(flag, source, files, say)
    return files
  if os.path.isfile(path):  # unlike Path.is_file, returns False for a name that is too long or not accessible
    return [path]
  if ('*' in path.name or '?' in path.name) and os.path.isdir(path.parent):
    names = sorted(name for name in os.listdir(path.parent) if fnmatch.fnmatchcase(name, _pattern(path.name)))
    files = [file for name in names if (file := path.parent / name).is_file() and not name.startswith('.')]
    if files:
      _tell(flag, source, files, say)
      return files
  if reading.kind_of(path)[0] in reading.KINDS:
    raise InputError(flag, source, 'there is no such file; check the path.')
  return []


def _pattern(name: str) -> str:
  return name.replace('[', '[[]')  # fnmatch also has character sets; here brackets are literal


def _of_folder(flag: str, source: str, folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder, sorted by name; hidden files are ignored."""
  try:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
  except OSError as e:
    raise InputError(flag, source, f'cannot be read ({reason(e)}); check its permissions.') from e
  found = sorted({'folders' if p.is_dir() else reading.kind_of(p)[0] or 'files without a suffix' for p in files})
  if len(found) != 1 or found[0] not in reading.KINDS:
    raise InputError(
      flag,
      source,
      f'a folder must hold {", ".join(reading.KINDS)} files, all of one kind, but this one holds '
      f'{", ".join(found[:8]) or "no files"}; give a folder with files of one kind, or a single file.',
    )
  return files


def _tell(flag: str, source: str, files: list[pathlib.Path], say: Callable[[str], None]):
  kind = ''.join(reading.kind_of(files[0]))
  say(f'{flag}={source}: reading {len(files)} {kind} files, {files[0].name} to {files[-1].name}')
