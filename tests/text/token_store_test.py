"""Cached tokens: the stream does not depend on how it is read, who writes it, or which writers were killed."""

import threading

import numpy as np
import pytest

from elder_jax.errors import InputError
from elder_jax.text import token_store
from elder_jax.text.documents import Place
from elder_jax.text.token_store import TokenStore

SIZES = [3, 0, 11, 25, 1, 1, 40, 7]  # tokens of each document
STREAM = np.arange(sum(SIZES))
MASK = STREAM % 3 > 0


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
  monkeypatch.setattr(token_store, 'SEGMENT', 10)


def encode(place: Place, fails_at: int = 99, masked: bool = False):
  for i in range(place.document, len(SIZES)):
    if i >= fails_at:
      raise InputError('train_data', 'x', 'is damaged.')
    first = sum(SIZES[:i])
    tokens = STREAM[first : first + SIZES[i]]
    yield tokens, MASK[tokens] if masked else None, Place(0, i + 1)


def check(store: TokenStore, masked: bool = False):
  for first in range(0, len(STREAM) + 3, 7):
    for count in (1, 5, 30, 100):
      tokens, counted = store.read(first, count)
      np.testing.assert_array_equal(tokens, STREAM[first : first + count])
      np.testing.assert_array_equal(counted, MASK[tokens] if masked else np.ones(len(tokens), bool))


@pytest.mark.parametrize('vocab_size', [2**16, 2**16 + 1])
@pytest.mark.parametrize('masked', [False, True])
def test_any_range_of_the_stream_can_be_read(tmp_path, masked, vocab_size):
  store = TokenStore(tmp_path / 'a', lambda place: encode(place, masked=masked), vocab_size)
  check(store, masked)
  assert store.whole and store.count() == len(STREAM)
  width = 2 if vocab_size <= 2**16 else 4
  assert sum(path.stat().st_size for path in tmp_path.glob('a/*.tokens')) == width * len(STREAM)


def test_only_the_needed_segments_and_a_few_more_are_made(tmp_path):
  store = TokenStore(tmp_path, encode, 100)
  assert 10 <= store.count(10) < len(STREAM) and not store.whole


def test_existing_segments_are_not_made_again(tmp_path):
  TokenStore(tmp_path, encode, 100).count()
  check(TokenStore(tmp_path, lambda place: pytest.fail('made again'), 100))


def test_an_incomplete_store_resumes_where_it_stopped(tmp_path):
  broken = TokenStore(tmp_path, lambda place: encode(place, fails_at=4), 100)
  with pytest.raises(InputError, match='train_data=x: is damaged'):
    broken.count()
  with pytest.raises(InputError, match='is damaged'):  # again, without waiting forever
    broken.read(0, 100)
  done = len([*tmp_path.glob('*.json')])
  assert done >= 1
  (tmp_path / f'{done:06d}.tokens').write_bytes(b'half')  # left by a process that was killed here
  (tmp_path / f'{done:06d}.json.7.partial').write_text('{"tok')
  places = []

  def resume(place):
    places.append(place)
    return encode(place)

  check(TokenStore(tmp_path, resume, 100))
  assert places[0].document > 0


def test_several_writers_do_not_interfere(tmp_path):
  stores = [TokenStore(tmp_path, encode, 100) for _ in range(4)]
  threads = [threading.Thread(target=check, args=(store,)) for store in stores]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for store in stores:
    check(store)


def test_a_follower_waits_for_process_0(tmp_path, monkeypatch):
  follower = TokenStore(tmp_path, lambda place: pytest.fail('made by a follower'), 100)
  leads = threading.local()
  monkeypatch.setattr(token_store.hosts, 'is_leader', lambda: not getattr(leads, 'follows', False))
  found = []

  def follow():
    leads.follows = True
    found.append(follower.count())

  thread = threading.Thread(target=follow)
  thread.start()
  TokenStore(tmp_path, encode, 100).count()
  thread.join(20)
  assert found == [len(STREAM)]
