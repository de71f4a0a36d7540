"""Evaluation texts, tokenising, and batches as a function of the step."""

import hashlib
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from elder_jax.errors import InputError
from elder_jax.text import data
from elder_jax.training.batches import rows_at

TEXT = '\n First line \n\n\nünïcode: 漢字 🙂 \u2028 \x0c end\r\nof Windows, \r of a Mac\n\n'
DOCUMENTS = ['a first\nof two lines', '', ' ünïcode 漢字 🙂 ', 'the last\n']


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def bytes_tokenizer(text, add_special_tokens, verbose):
  return {'input_ids': ([1000] if add_special_tokens else []) + list(text.encode())}


def write(tmp_path, kind: str, column: str = 'text', documents=DOCUMENTS) -> str:
  path = tmp_path / f'text.{kind}'
  if kind == 'parquet':
    pyarrow.parquet.write_table(pyarrow.table({'id': list(range(len(documents))), column: documents}), path)
  else:
    path.write_text(''.join(json.dumps({'id': i, column: d}) + '\n' for i, d in enumerate(documents)))
  return str(path)


def test_a_txt_file_is_one_unchanged_document(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(TEXT.encode())
  assert data.read_text('--train_data', str(path), 'another column') == TEXT


def test_a_txt_file_that_is_not_utf8_is_refused(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes('naïve'.encode('latin-1'))
  with pytest.raises(InputError, match='train_data.*text.txt'):
    data.read_text('--train_data', str(path), 'text')


@pytest.mark.parametrize('kind', ['jsonl', 'json', 'parquet'])
def test_documents_are_joined_by_an_empty_line(tmp_path, kind):
  path = write(tmp_path, kind)
  assert data.read_text('--train_data', path, 'text') == 'a first\nof two lines\n\n\n\n ünïcode 漢字 🙂 \n\nthe last\n'


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_text_column(tmp_path, kind):
  path = write(tmp_path, kind, 'body', ['one', None, 'two'])
  assert data.read_text('--train_data', path, 'body') == 'one\n\ntwo'  # a row without a text is skipped
  with pytest.raises(InputError, match="'text'.*'body'.*--text_column"):
    data.read_text('--train_data', path, 'text')


def test_a_changed_file_is_read_again(tmp_path):
  assert data.read_text('--x', write(tmp_path, 'jsonl', documents=['old']), 'text') == 'old'
  assert data.read_text('--x', write(tmp_path, 'jsonl', documents=['newer']), 'text') == 'newer'


def test_a_missing_file_is_refused(tmp_path):
  for name in ('none.txt', 'none.parquet'):
    with pytest.raises(InputError, match=f'eval_data=x.*{name}.*no such file'):
      data.read_text('--eval_data=x', str(tmp_path / name), 'text')


def test_tokenise_records_source_and_checksum(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(TEXT.encode())
  with_bos = data.tokenise('--x', str(path), 'text', bytes_tokenizer)
  without = data.tokenise('--x', str(path), 'text', bytes_tokenizer, special_tokens=False)
  assert with_bos.sha256 == without.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
  assert without.tokens_N.tolist() == list(TEXT.encode()) and without.tokens_N.dtype == np.int32
  assert with_bos.tokens_N.tolist() == [1000, *TEXT.encode()]
  assert with_bos.source == str(path)
  joined = data.tokenise('--x', write(tmp_path, 'jsonl'), 'text', bytes_tokenizer)
  assert joined.sha256 == hashlib.sha256('\n\n'.join(DOCUMENTS).encode()).hexdigest()


def test_batch_depends_only_on_the_step_and_visits_each_row_once_per_pass():
  rows_NT = np.arange(36).reshape(12, 3)
  steps = [rows_NT[rows_at(12, 4, i, 5)] for i in range(12)]
  for i in (7, 2, 11, 0):  # in any order
    np.testing.assert_array_equal(rows_NT[rows_at(12, 4, i, 5)], steps[i])
  passes = [np.concatenate(steps[i : i + 3]) for i in range(0, 12, 3)]
  for rows in passes:
    np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], rows_NT)
  assert len({rows.tobytes() for rows in passes}) == 4
  assert any((rows_NT[rows_at(12, 4, i, 6)] != steps[i]).any() for i in range(3))


def test_no_seed_keeps_the_order():
  for i in range(6):
    np.testing.assert_array_equal(rows_at(12, 4, i, None), np.arange(4 * (i % 3), 4 * (i % 3) + 4))


def test_a_tokenizer_in_the_home_folder_is_found(tiny, monkeypatch):
  monkeypatch.setenv('HOME', str(tiny.parent))
  assert data.load_tokenizer(f'~/{tiny.name}')('ab')['input_ids'] == data.load_tokenizer(str(tiny))('ab')['input_ids']
