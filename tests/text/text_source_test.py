"""Which files a source reads: paths are not patterns, folders are read whole, and errors name files that are not UTF-8."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import types

import pyarrow
import pyarrow.parquet
import pytest
from refusal import one_sentence

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.text import data
from elder_jax.text import hub
from elder_jax.text.documents import Documents


def write(path: pathlib.Path, *documents: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.parquet':
    pyarrow.parquet.write_table(pyarrow.table({'text': documents}), path)
  elif path.suffix == '.json':
    path.write_text(json.dumps([{'text': d} for d in documents], indent=1))
  else:
    path.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
  return path


def read(source) -> str:
  return data.read_text('--x', str(source), 'text')


def refused(source, *parts):
  with pytest.raises(InputError) as caught:
    read(source)
  one_sentence(caught.value.for_command(), f'--x={source}', *parts)


@pytest.mark.parametrize('kind', ['jsonl', 'json', 'parquet'])
@pytest.mark.parametrize('name', ['[v1] news', '1*', '1?', '{1,v}', '**', 'zip::1', 'hf:', '1=v', '%31', '#1'])
def test_a_path_is_not_a_pattern(tmp_path, monkeypatch, kind, name):
  for decoy in ('1 news', 'v news', '1', '11', 'v', 'a'):
    write(tmp_path / decoy / f'a.{kind}', 'another file')
  path = write(tmp_path / name / f'a.{kind}', 'this file')
  assert read(path) == 'this file'
  assert read(path.parent) == 'this file'
  monkeypatch.chdir(tmp_path)
  assert read(f'{name}/a.{kind}') == 'this file'
  path.unlink()
  refused(path, 'no such file')


@pytest.mark.parametrize('kind', ['jsonl', 'json', 'parquet'])
def test_the_files_of_a_folder_are_read_in_order_of_names(tmp_path, capsys, kind):
  for i in (10, 2, 1):
    write(tmp_path / 'texts' / f'{i}.{kind}', f'first of {i}', f'second of {i}')
  (tmp_path / 'texts' / '.DS_Store').write_bytes(b'\0')
  assert read(tmp_path / 'texts') == '\n\n'.join(f'{n} of {i}' for i in (1, 10, 2) for n in ('first', 'second'))
  assert f'texts: reading 3 .{kind} files, 1.{kind} to 2.{kind}\n' in capsys.readouterr().err


def test_a_folder_of_txt_files_has_one_document_per_file(tmp_path, capsys):
  (tmp_path / 'b.txt').write_text('the second\nof two lines\n')
  (tmp_path / 'a.TXT').write_text('the first\nof two lines')
  (tmp_path / 'c.txt').write_text('')
  assert read(tmp_path) == 'the first\nof two lines\n\nthe second\nof two lines\n'
  assert 'reading 3 .txt files' in capsys.readouterr().err


def test_a_folder_with_files_of_several_kinds_is_refused(tmp_path):
  refused(tmp_path, 'no files')
  (tmp_path / 'a.txt').write_text('a')
  (tmp_path / 'README.md').write_text('b')
  refused(tmp_path, 'this one holds .md, .txt;')
  (tmp_path / 'README.md').unlink()
  (tmp_path / 'more').mkdir()
  refused(tmp_path, 'this one holds .txt, folders;')
  (tmp_path / 'more').rmdir()
  write(tmp_path / 'b.jsonl', 'b')
  refused(tmp_path, 'this one holds .jsonl, .txt;')
  (tmp_path / 'a.txt').unlink()
  (tmp_path / 'c.jsonl').write_text('{"body": "c"}')
  with pytest.raises(InputError, match=r"c\.jsonl: has no column 'text' but \['body'\]"):
    read(tmp_path)


@pytest.mark.parametrize('name', ['a.TXT', 'a.JSONL', 'a.Json', 'a.PARQUET'])
def test_a_suffix_may_have_any_case(tmp_path, name):
  path = write(tmp_path / name.lower(), 'some text')
  if name == 'a.TXT':
    path.write_text('some text')
  assert read(path.rename(tmp_path / 'other').rename(tmp_path / name)) == 'some text'


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json'])
def test_a_byte_order_mark_changes_nothing(tmp_path, name):
  without = write(tmp_path / name, 'sôme text')
  marked = tmp_path / f'marked_{name}'
  marked.write_bytes(b'\xef\xbb\xbf' + without.read_bytes())

  def tokenizer(text, **_):
    return {'input_ids': list(text.encode())}

  one, other = (data.tokenise('--x', str(path), 'text', tokenizer) for path in (without, marked))
  assert one.sha256 == other.sha256 and one.tokens_N.tolist() == other.tokens_N.tolist()
  marked.write_bytes(b'\xef\xbb\xbf')
  if name == 'a.txt':
    refused(marked, 'is empty')


def test_json_with_any_line_endings_and_lookalikes(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes('{"text": "a\u2028b\x85c"}\r\n\r\n{"id": 1}\r\n{"text": null}\n{"text": "d"}'.encode())
  assert read(path) == 'a\u2028b\x85c\n\nd'


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.parquet', 'a.txt.zst', 'a'])
@pytest.mark.parametrize(
  ('content', 'what'),
  [
    (gzip.compress(b'text'), 'gzip'),
    (bz2.compress(b'text'), 'bzip2'),
    (lzma.compress(b'text'), 'xz'),
    (b'PK\x03\x04 and more', 'zip archive'),
    ('text'.encode('utf-16'), 'UTF-16'),
    (b'\xfe\xff' + 'text'.encode('utf-16-be'), 'UTF-16'),
    ('text'.encode('utf-32'), 'UTF-32'),
    (b'%PDF-1.7', 'PDF'),
  ],
  ids=lambda v: v if isinstance(v, str) else '',
)
def test_the_error_names_the_real_kind_of_a_misnamed_file(tmp_path, name, content, what):
  (tmp_path / name).write_bytes(content)
  refused(tmp_path / name, f'{what};')


def test_other_content_that_is_not_text_is_refused(tmp_path):
  for name, content, words in (
    ('a.txt', 'text'.encode('utf-16-le'), 'binary data or UTF-16'),
    ('b.jsonl', write(tmp_path / 'c.parquet', 'text').read_bytes(), 'a Parquet file'),
    ('d.jsonl', b'{"text": "a\\ud800"}', 'unpaired surrogate'),
    ('e.jsonl', b'{"text": "a"}\n{"text": "b"\n', 'line 2'),
    ('f.jsonl', b'{"text": "a"}\n"b"\n', 'not a JSON object'),
    ('g.json', b'[{"text": "a"}', 'cannot be read'),
  ):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)


@pytest.mark.parametrize('source', ['text', 'json', 'parquet', 'texts:train', 'texts*', './x', '/no/such', ''])
def test_local_names_are_not_passed_to_datasets(tmp_path, monkeypatch, source):
  """The readers of datasets ('text', say) read any file in the current folder, and 'folder:split' skips files."""
  write(tmp_path / 'texts' / 'train.jsonl', 'wrong')
  write(tmp_path / 'train.jsonl', 'wrong')
  write(tmp_path / 'train.parquet', 'wrong')
  (tmp_path / 'train.txt').write_text('wrong')
  monkeypatch.chdir(tmp_path)
  refused(source, 'nor the id of a hub data set')


def test_hub_ids_with_configuration_and_split_are_parsed():
  for source, found in (
    ('owner/name', ('owner/name', '', 'train')),
    ('owner/name:validation', ('owner/name', '', 'validation')),
    ('owner/name:train[:10%]', ('owner/name', '', 'train[:10%]')),
    ('owner/name:sample-10BT', ('owner/name', 'sample-10BT', 'train')),
    ('owner/name:training-free:test', ('owner/name', 'training-free', 'test')),
  ):
    assert hub.check_hub_id('x', source) == found


def test_an_unreachable_hub_is_reported_once(monkeypatch):
  def unreachable(*args, **kwargs):
    raise ConnectionError('no route')

  monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', unreachable)
  with pytest.raises(InputError) as caught:
    next(hub.Hub('train_data', 'owner/name').rows(0))
  assert str(caught.value).count('cannot be read') == 1 and 'no route' in str(caught.value)


def test_hub_rows_are_streamed_from_one_revision(monkeypatch):
  asked = []

  class Rows(list):
    def skip(self, count):
      return self[count:]

  def load(*args, **kwargs):
    asked.append((args, kwargs))
    return Rows({'text': f'row {i}'} for i in range(5))

  monkeypatch.setattr('huggingface_hub.HfApi.dataset_info', lambda *a: types.SimpleNamespace(sha='abc'))
  monkeypatch.setattr('datasets.load_dataset', load)
  documents = Documents('train_data', 'owner/name:web:train', 'text')
  found = list(documents.read())
  assert [d.content for d, _ in found] == [f'row {i}' for i in range(5)] and documents.revision == 'abc'
  assert [d.content for d, _ in documents.read(found[2][1])] == ['row 3', 'row 4']
  assert asked[0] == (('owner/name', 'web'), dict(split='train', streaming=True, revision='abc'))


def test_a_reason_is_one_short_line(tmp_path):
  assert reason(ValueError('while parsing a block\n  in "a.yaml", line 3\nmapping values ')) == (
    'while parsing a block in "a.yaml", line 3 mapping values'
  )
  assert reason(ValueError()) == 'ValueError' and reason(ValueError(' \n ')) == 'ValueError'
  assert reason(KeyError('acc')) == "KeyError: 'acc'"
  long = reason(ValueError('word ' * 1000))
  assert len(long) == 300 and long.endswith('…')
  with pytest.raises(OSError) as caught:
    os.stat(tmp_path / 'none')
  assert reason(caught.value) == f'No such file or directory: {tmp_path / "none"}'
  assert reason(OSError('a library of its own\nkind')) == 'a library of its own kind'
