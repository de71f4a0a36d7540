"""Rows from several sources: weights, order, repetition, held-out rows."""

import numpy as np
import pytest

from elder_jax.errors import InputError
from elder_jax.text import token_store
from elder_jax.text.blend import Part
from elder_jax.text.blend import Rows
from elder_jax.text.blend import Source
from elder_jax.text.blend import Window
from elder_jax.text.blend import parts_of
from elder_jax.text.blend import shares
from elder_jax.text.documents import Place
from elder_jax.text.token_store import TokenStore


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
  monkeypatch.setattr(token_store, 'SEGMENT', 64)


def source(tmp_path, name: str, tokens: int, first: int | None = None, length: int = 5) -> Source:
  """Tokens 1000·i + 0, 1, 2 … for the i-th name of a, b, c."""

  def encode(place: Place):
    for document in range(place.document, tokens):
      yield np.array([1000 * 'abc'.index(name) + document]), None, Place(0, document + 1)

  store = TokenStore(tmp_path / f'{name}{tokens}', encode, 10_000)
  return Source(Part('train_data', name, name, name, 1.0), store, Window(length, first), False)


def drawn(
  tmp_path, name: str, tokens: int, needed: int, held: int = 0, seed: int | None = 0, whole: bool = True
) -> Source:
  found = source(tmp_path, name, tokens)
  found.draw(needed, held, seed, whole)
  return found


def everything(rows: Rows) -> np.ndarray:
  return rows[np.arange(len(rows))]


def test_a_single_source_is_drawn_at_random_or_in_text_order(tmp_path):
  whole_NT = np.arange(105).reshape(21, 5)
  for seed in (0, 1, 2):
    rows = Rows([drawn(tmp_path, 'a', 107, 4, seed=seed)], [4])
    expected = whole_NT[np.sort(np.random.default_rng(seed).choice(21, 4, replace=False))]
    np.testing.assert_array_equal(everything(rows), expected)
  np.testing.assert_array_equal(everything(Rows([drawn(tmp_path, 'a', 107, 4, seed=None)], [4])), whole_NT[:4])
  np.testing.assert_array_equal(everything(Rows([drawn(tmp_path, 'a', 107, 4, whole=False)], [4])), whole_NT[:4])


def test_each_row_starts_with_the_first_token(tmp_path):
  found = source(tmp_path, 'a', 107, first=999)
  found.draw(26, 0, None, True)
  rows_NT = everything(Rows([found], [26]))
  assert (rows_NT[:, 0] == 999).all() and rows_NT.dtype == np.int32
  np.testing.assert_array_equal(rows_NT[:, 1:], np.arange(104).reshape(26, 4))


def test_weights_hold_in_every_part_of_a_run(tmp_path):
  counts = shares([0.6, 0.3, 0.1], 200)
  assert counts == [120, 60, 20]
  sources = [drawn(tmp_path, name, 1200, n, whole=False) for name, n in zip('abc', counts)]
  of_row = everything(Rows(sources, counts))[:, 0] // 1000
  for i, weight in enumerate([0.6, 0.3, 0.1]):
    seen = np.cumsum(of_row == i)
    assert np.abs(seen - weight * np.arange(1, 201)).max() <= 1
    assert seen[-1] == counts[i]


@pytest.mark.parametrize('rows', [1, 7, 100])
def test_shares_sum_to_the_number_of_rows(rows):
  for weights in ([1.0], [1 / 3] * 3, [0.55, 0.449, 0.001], [0.0, 1.0]):
    found = shares(weights, rows)
    assert sum(found) == rows and np.abs(np.array(found) - np.array(weights) * rows).max() < 1


@pytest.mark.parametrize('whole', [True, False])
def test_a_short_source_repeats_and_the_report_counts_it(tmp_path, whole):
  short = drawn(tmp_path, 'b', 50, 30, whole=whole)
  rows = Rows([drawn(tmp_path, 'a', 1000, 30), short], [30, 30])
  found_NT = everything(rows)
  of_b = found_NT[found_NT[:, 0] >= 1000]
  assert len(of_b) == 30
  for a_pass in np.split(of_b, 3):  # each row once per pass
    np.testing.assert_array_equal(np.sort(a_pass[:, 0]), 1000 + np.arange(0, 50, 5))
  about = {a['name']: a for a in rows.about(60)}
  assert about['b'] | {'weight': 0} == {
    'name': 'b', 'source': 'b', 'weight': 0, 'rows': 30, 'tokens': 50, 'times': 3.0,
  }  # fmt: skip
  assert about['a']['times'] == 1.0
  assert {a['name']: a['times'] for a in rows.about(120)} == {'a': 2.0, 'b': 6.0}  # two passes
  assert rows.about(20)[1]['rows'] == 10


@pytest.mark.parametrize('whole', [True, False])
def test_held_out_rows_are_never_trained_on(tmp_path, whole):
  sources = [drawn(tmp_path, name, 200, 60, held, whole=whole) for name, held in (('a', 6), ('b', 3))]
  held = everything(Rows(sources, [6, 3], held_out=True))
  trained = everything(Rows(sources, [60, 60]))
  assert len(held) == 9 and len({row.tobytes() for row in held}) == 9
  assert not {row.tobytes() for row in held} & {row.tobytes() for row in trained}
  assert {row.tobytes() for row in held} | {row.tobytes() for row in trained} == {
    row.tobytes() for first in (0, 1000) for row in (first + np.arange(200, dtype=np.int32)).reshape(40, 5)
  }


def test_a_row_does_not_depend_on_the_order_of_reading(tmp_path):
  def rows():
    sources = [drawn(tmp_path, 'a', 300, 20), drawn(tmp_path, 'b', 40, 20, whole=False)]
    return Rows(sources, [20, 20])

  expected = everything(rows())
  for n in (39, 0, 17, 38, 3):
    np.testing.assert_array_equal(rows()[[n]], expected[[n]])


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
  rows = Rows([drawn(tmp_path, 'a', 300, 20)], [20], vocab_size=200)
  with pytest.raises(InputError, match='train_data=a: the tokenizer made token .*the model has 200.*--tokenizer'):
    everything(rows)


def test_sources_with_names_and_weights_are_parsed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('a=b.txt', 'c@0.5', 'd'):
    (tmp_path / name).touch()
  entries = ('a=b.txt', 'c@0.5', 'web=owner/name:cfg:train@3', 'd@1', 'x=/no/such.jsonl')
  found = [(p.name, p.source, round(p.weight, 4)) for p in parts_of(entries, 'train_data')]
  assert found == [
    ('a=b.txt', 'a=b.txt', 0.1429),
    ('c@0.5', 'c@0.5', 0.1429),
    ('web', 'owner/name:cfg:train', 0.4286),
    ('d', 'd', 0.1429),
    ('x', '/no/such.jsonl', 0.1429),
  ]
  with pytest.raises(InputError, match="the name 'd' is given twice"):
    parts_of(('d', 'd@2'), 'train_data')
  with pytest.raises(InputError, match='sum to 0'):
    parts_of(('d@0',), 'train_data')
