"""Documents of all kinds of files: compressed or not, and read from any place on."""

import gzip
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
from refusal import one_sentence

from elder_jax.errors import InputError
from elder_jax.text import reading
from elder_jax.text.documents import Documents
from elder_jax.text.documents import Place

TEXTS = ['the first\nof two lines', ' ünïcode 漢字 🙂 ', 'the last\n']


def contents(kind: str) -> bytes:
  if kind in ('txt', 'md'):
    return TEXTS[0].encode()
  if kind == 'json':
    return json.dumps([{'text': t} for t in TEXTS]).encode()
  if kind == 'jsonl':
    return ''.join(json.dumps({'text': t}) + '\n' for t in TEXTS).encode()
  sink = pyarrow.BufferOutputStream()
  pyarrow.parquet.write_table(pyarrow.table({'id': [1, 2, 3], 'text': TEXTS}), sink)
  return sink.getvalue().to_pybytes()


def packed(content: bytes, suffix: str) -> bytes:
  if suffix == '.zst':
    return pyarrow.compress(content, 'zstd', asbytes=True)
  return gzip.compress(content) if suffix == '.gz' else content


def read(source, column: str = 'text', place: Place = Place(0, 0)) -> list:
  return [d.content for d, _ in Documents('x', str(source), column).read(place)]


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst', '.GZ'])
@pytest.mark.parametrize('kind', ['txt', 'md', 'json', 'jsonl', 'parquet'])
def test_all_kinds_with_all_compressions(tmp_path, kind, suffix):
  path = tmp_path / f'a.{kind}{suffix}'
  path.write_bytes(packed(contents(kind), suffix.lower()))
  assert read(path) == (TEXTS[:1] if kind in ('txt', 'md') else TEXTS)


def test_a_compressed_file_that_is_truncated_or_misnamed_is_refused(tmp_path):
  for name, content, words in (
    ('cut.jsonl.gz', gzip.compress(contents('jsonl') * 500)[:-30], 'cannot be read'),
    ('b.txt.gz', b'just a text', 'cannot be read'),
    ('c.txt.zst', gzip.compress(b'text'), 'compressed by gzip'),
    ('d.txt.gz', gzip.compress(b'%PDF-1.7'), 'a PDF'),
    ('e.csv.gz', gzip.compress(b'text'), 'not of a supported kind'),
    ('f.txt', gzip.compress(b'text'), 'compressed by gzip'),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
      read(tmp_path / name)
    one_sentence(caught.value.for_command(), f'--x={tmp_path / name}', words)


def test_reading_resumes_from_any_place(tmp_path):
  for i in range(3):
    rows = [{'text': f'{j} of {i}'} if j % 3 else {'id': j} for j in range(7)]
    (tmp_path / f'{i}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  found = list(Documents('x', str(tmp_path), 'text').read())
  assert len(found) == 12
  for i, (_, place) in enumerate(found):
    assert read(tmp_path, place=place) == [d.content for d, _ in found[i + 1 :]]


def test_a_pattern_matches_file_names_but_not_folders(tmp_path, capsys):
  for name in ('a1.jsonl', 'a2.jsonl', 'b.jsonl', 'a[1].jsonl'):
    (tmp_path / '[x]').mkdir(exist_ok=True)
    (tmp_path / '[x]' / name).write_text(json.dumps({'text': name}))
  assert read(tmp_path / '[x]' / 'a?.jsonl') == ['a1.jsonl', 'a2.jsonl']
  assert 'reading 2 .jsonl files, a1.jsonl to a2.jsonl' in capsys.readouterr().err
  assert read(tmp_path / '[x]' / 'a[1]*') == ['a[1].jsonl']
  with pytest.raises(InputError, match='no such file'):
    read(tmp_path / '*' / 'a1.jsonl')


@pytest.mark.parametrize('line_end', ['\n', ''])
def test_a_large_text_is_read_in_pieces(tmp_path, monkeypatch, line_end):
  monkeypatch.setattr(reading, '_WHOLE', 40)
  monkeypatch.setattr(reading, 'PIECE', 64 if line_end else 16)
  text = ''.join(f'é漢🙂{i} and more{line_end}' for i in range(40))
  (tmp_path / 'a.txt').write_text(text)
  found = list(Documents('x', str(tmp_path / 'a.txt'), 'text').read())
  assert ''.join(d.content for d, _ in found) == text and len(found) > 10
  assert [d.ends for d, _ in found] == [False] * (len(found) - 1) + [True]
  if line_end:
    assert all(d.content.endswith('\n') for d, _ in found)
  for i, (_, place) in enumerate(found):
    assert read(tmp_path / 'a.txt', place=place) == [d.content for d, _ in found[i + 1 :]]


def test_conversations_in_all_forms(tmp_path):
  said = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'ho'}]
  rows = [{'messages': said}, {'prompt': 'hi', 'completion': 'ho'}, {'prompt': said[:1], 'completion': said[1:]}]
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert read(path) == [said] * 3
  pyarrow.parquet.write_table(pyarrow.table({'turns': [said, None], 'id': [1, 2]}), tmp_path / 'a.parquet')
  assert read(tmp_path / 'a.parquet', 'turns') == [said]
  path.write_text('{"messages": [{"role": "user"}]}')
  with pytest.raises(InputError, match='no text and no messages'):
    read(path)


def test_order_of_hashes_depends_on_the_seed_and_not_on_the_order_of_names(tmp_path):
  for i in range(20):
    (tmp_path / f'{i:02d}.txt').write_text('x')
  documents = Documents('x', str(tmp_path), 'text')
  by_name = [file.name for file in documents.files]
  orders = []
  for seed in (0, 1, 0):
    documents.in_order_of_hashes(seed)
    orders.append([file.name for file in documents.files])
  assert orders[0] == orders[2] != orders[1] and by_name not in orders
  assert all(sorted(order) == by_name for order in orders)


def test_memory_does_not_grow_with_a_file(tmp_path):
  """Reading 20 MB of documents takes less than 2 MB of memory."""
  import tracemalloc

  row = json.dumps({'text': 'word ' * 2000}).encode() + b'\n'
  path = pathlib.Path(tmp_path / 'a.jsonl.gz')
  with gzip.open(path, 'wb', compresslevel=1) as file:
    for _ in range(20):
      file.write(row * 100)
  documents = Documents('x', str(path), 'text')
  tracemalloc.start()
  count = sum(1 for _ in documents.read())
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert count == 2000 and peak < 2e6
