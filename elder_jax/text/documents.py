"""Documents of a file, a folder, several files by a pattern, or a hub data set: one after another, never all at once."""

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
    size: bytes of text in the files, those of compressed ones and of Parquet guessed; None for a hub data set.
  """

  def __init__(self, flag: str, source: str, column: str):
    """Opens the source.

    Args:
      flag: what to name in an error, e.g. train_data.
      source: a .txt, .md (a document each), .jsonl, .json or .parquet file, also as .gz or .zst; a folder of files of one
        kind; a folder with a pattern for names, as in texts/*.jsonl.gz; or a hub id as hub.check_hub_id has it.
      column: of a text or of messages. Without it a row may have `messages`, or `prompt` and `completion`.

    Raises:
      InputError: it cannot be read. A file is opened for that, not read through.
    """
    self.flag, self.source, self.column = flag, source, column
    self._columns = (column, *CHAT_COLUMNS)
    self.files = list_files(flag, source)
    self.size = sum(map(_text_bytes, self.files)) if self.files else None
    self._hub = None if self.files else hub.Hub(flag, source)
    for file in self.files:
      reading.open_file(self.flag, self._name(file), file).close()

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

  def in_order_of_hashes(self, seed: int):
    """Puts the files in an order that has nothing to do with their names: the beginning is then a sample of the whole."""
    self.files.sort(key=lambda file: hashlib.sha256(f'{seed}{file.name}'.encode()).digest())

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
      with reading.open_file(self.flag, name, file) as opened:
        kind = reading.kind_of(file)[0]
        if kind in ('.txt', '.md'):
          yield from itertools.starmap(Document, reading.pieces(opened))
        else:
          rows = reading.parquet_rows(opened, self._columns) if kind == '.parquet' else reading.json_rows(opened)
          yield from self._of_rows(rows, name)
    except InputError:
      raise
    except Exception as e:  # of a damaged file any kind  # noqa: BLE001
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
    except UnicodeEncodeError as e:  # JSON can hold it
      raise InputError(self.flag, name, 'holds half of a surrogate pair, which is no character; remove it.') from e


def _turn(role: str, said) -> list:
  """A prompt or completion, which may be a list of messages itself."""
  return said if isinstance(said, list) else [] if said is None else [{'role': role, 'content': said}]


def _is_message(message: Any) -> bool:
  return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ('role', 'content'))


def _text_bytes(file: pathlib.Path) -> int:
  kind, packed = reading.kind_of(file)
  return file.stat().st_size * (4 if packed or kind == '.parquet' else 1)


# ---- which files ----


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
  if reading.kind_of(path)[0] in reading.KINDS:
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
  found = sorted({'folders' if p.is_dir() else reading.kind_of(p)[0] or 'files without a suffix' for p in files})
  if len(found) != 1 or found[0] not in reading.KINDS:
    raise InputError(
      flag,
      source,
      f'a folder must hold {", ".join(reading.KINDS)} files, all of one kind, this one holds '
      f'{", ".join(found[:8]) or "no files"}; give a folder of one kind, or a file.',
    )
  return files


def _tell(flag: str, source: str, files: list[pathlib.Path], say: Callable[[str], None]):
  kind = ''.join(reading.kind_of(files[0]))
  say(f'{flag}={source}: reading {len(files)} {kind} files, {files[0].name} to {files[-1].name}')
