"""From sources to rows: separate documents, masked conversations, cached tokens that are made again when needed."""

import json

import numpy as np
import pytest

from elder_jax.errors import InputError
from elder_jax.text import data
from elder_jax.text import training_text
from elder_jax.text.settings import DataSettings
from elder_jax.text.training_text import open_text
from elder_jax.training.batches import Batches

EOS = 1
CHATML = (
  '{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}'
  '{% if add_generation_prompt %}<assistant>{% endif %}'
)


@pytest.fixture(scope='module')
def tokenizer(tiny):
  return data.load_tokenizer(str(tiny))


@pytest.fixture
def chatting(tiny):
  tokenizer = data.load_tokenizer(str(tiny))
  tokenizer.chat_template = CHATML
  return tokenizer


def opened(tokenizer, *sources, validates: bool = False, **more):
  usual = dict(seq_len=8, num_sequences=4, batch_size=2, shuffle=False)
  settings = DataSettings(train_data=tuple(map(str, sources)), **usual | more)
  return open_text(settings, tokenizer, False, 300, validates)


def said(tokenizer, rows) -> str:
  return tokenizer.decode(np.concatenate(rows[np.arange(len(rows))]))


def write(path, *rows):
  path.write_text(''.join(json.dumps(row if isinstance(row, dict) else {'text': row}) + '\n' for row in rows))
  return path


def test_documents_are_separated(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', *(f'document {i}' for i in range(10)))
  assert said(tokenizer, opened(tokenizer, path).rows).startswith('document 0</s>document 1</s>docu')
  wikitext = opened(tokenizer, path, documents='wikitext').rows
  assert said(tokenizer, wikitext).startswith('document 0\n\ndocument 1\n\ndocu')


def test_a_large_text_file_is_still_one_document(tmp_path, tokenizer, monkeypatch):
  from elder_jax.text import reading

  monkeypatch.setattr(reading, '_WHOLE', 20)
  monkeypatch.setattr(reading, 'PIECE', 10)
  (tmp_path / 'a.txt').write_text('a line of text\n' * 10)
  rows = opened(tokenizer, tmp_path / 'a.txt', num_sequences=18).rows
  assert EOS not in rows[np.arange(18)] and said(tokenizer, rows) == ('a line of text\n' * 10)[: 18 * 8]


def test_a_tokenizer_without_an_end_of_text_token(tmp_path, tiny):
  tokenizer = data.load_tokenizer(str(tiny))
  tokenizer.eos_token = None
  path = write(tmp_path / 'a.jsonl', 'text ' * 50)
  with pytest.raises(InputError, match='documents=eos.*--documents=wikitext'):
    opened(tokenizer, path, documents='eos')
  for between in ('wikitext', 'auto'):
    assert len(opened(tokenizer, path, documents=between).rows) == 4


TURNS = [
  {'role': 'user', 'content': 'one'},
  {'role': 'assistant', 'content': 'two!'},
  {'role': 'user', 'content': 'three'},
  {'role': 'assistant', 'content': 'four'},
]


def test_only_the_assistants_tokens_of_a_conversation_count(tmp_path, chatting):
  path = write(tmp_path / 'a.jsonl', *[{'messages': TURNS}] * 3)
  rows = opened(chatting, path).rows
  assert rows.masked
  tokens, counted = (np.concatenate(f(np.arange(4))) for f in (rows.__getitem__, rows.counted))
  whole = '<user>one</>\n<assistant>two!</>\n<user>three</>\n<'
  assert chatting.decode(tokens) == whole[:32]
  own = ''.join(c if counted[i] else '.' for i, c in enumerate(whole[:32]))
  assert own == '.' * whole.index('two') + 'two!</>' + '.' * (32 - whole.index('two') - 7)
  batches = Batches(rows, 2, None)
  weight_BT = np.concatenate([batches.weight_BT(i) for i in range(2)])
  np.testing.assert_array_equal(weight_BT[:, :-1], rows.counted(np.arange(4))[:, 1:])  # of the next token
  assert not weight_BT[:, -1].any()


def test_all_tokens_count_with_train_on_all_or_without_conversations(tmp_path, chatting):
  path = write(tmp_path / 'a.jsonl', *[{'messages': TURNS}] * 3)
  for rows in (
    opened(chatting, path, train_on='all').rows,
    opened(chatting, write(tmp_path / 'b.jsonl', 'x' * 99)).rows,
  ):
    assert not rows.masked and Batches(rows, 2, None).weight_BT(0) is None and rows.counted([0, 1]).all()


def test_another_template_makes_other_tokens(tmp_path, chatting):
  path, cache = write(tmp_path / 'a.jsonl', *[{'messages': TURNS}] * 3), str(tmp_path / 'cache')
  before = opened(chatting, path, token_cache=cache)
  chatting.chat_template = CHATML.replace('<', '[')
  after = opened(chatting, path, token_cache=cache)
  assert said(chatting, after.rows).startswith('[user>one') and before.read != after.read


def test_conversations_that_cannot_be_rendered_are_refused(tmp_path, tiny, chatting):
  path = write(tmp_path / 'a.jsonl', *[{'messages': TURNS}] * 3)
  without = data.load_tokenizer(str(tiny))
  without.chat_template = None
  with pytest.raises(InputError, match='train_data=.*no chat template'):
    opened(without, path)
  chatting.chat_template = '{{ raise_exception("roles must alternate") }}'
  with pytest.raises(InputError, match='train_data=.*refuses a conversation .*roles must alternate'):
    opened(chatting, path)
  # Like Qwen3's, which shows the reasoning of the last turn only.
  chatting.chat_template = '{% for m in messages %}{{ m.content }}{% if loop.last %}</think>{% endif %}|{% endfor %}'
  with pytest.raises(InputError, match='--train_on=all'):
    opened(chatting, path)
  assert len(opened(chatting, path, train_on='all').rows) == 4


@pytest.mark.parametrize('train_on', ['assistant', 'all'])
def test_conversations_that_the_template_refuses_are_skipped_and_reported(tmp_path, chatting, capsys, train_on):
  refuses = '{% if messages[0].content == "no" %}{{ raise_exception("not this") }}{% endif %}'
  chatting.chat_template = refuses + CHATML
  bad = {'messages': [{'role': 'user', 'content': 'no'}, *TURNS[1:]]}
  rows = [{'messages': TURNS}] * 6
  clean = opened(chatting, write(tmp_path / 'a.jsonl', *rows), train_on=train_on).rows
  mixed = opened(chatting, write(tmp_path / 'b.jsonl', bad, *rows[:3], bad, *rows[3:], bad), train_on=train_on).rows
  assert said(chatting, mixed) == said(chatting, clean)
  told = capsys.readouterr()
  assert '1 rows skipped so far: the chat template refuses a conversation' in told.err + told.out


def test_conversations_after_texts_are_refused(tmp_path, chatting):
  path = write(tmp_path / 'a.jsonl', 'text ' * 3, *[{'messages': TURNS}] * 3)
  with pytest.raises(InputError, match='has conversations after texts'):
    opened(chatting, path)


def test_tokens_are_made_once_for_the_same_content_and_options(tmp_path, tokenizer, monkeypatch):
  path, cache = write(tmp_path / 'a.jsonl', 'text ' * 50), tmp_path / 'cache'
  first = opened(tokenizer, path, token_cache=str(cache)).rows[np.arange(4)]
  assert len([*cache.iterdir()]) == 1

  def calls(*args, **kwargs):
    return pytest.fail('tokenised again')

  with monkeypatch.context() as patch:
    patch.setattr(training_text.Encoder, '__call__', calls)
    again = opened(tokenizer, path, token_cache=str(cache)).rows[np.arange(4)]
  np.testing.assert_array_equal(first, again)
  opened(tokenizer, path, token_cache=str(cache), documents='wikitext')
  write(path, 'other ' * 50)
  other = opened(tokenizer, path, token_cache=str(cache)).rows[np.arange(4)]
  assert len([*cache.iterdir()]) == 3 and not np.array_equal(first, other)


@pytest.mark.parametrize('shuffle', [True, False])
def test_a_large_source_is_read_only_as_far_as_needed(tmp_path, tokenizer, monkeypatch, shuffle):
  from elder_jax.text import token_store

  monkeypatch.setattr(training_text, 'SMALL', 100)
  monkeypatch.setattr(token_store, 'SEGMENT', 100)
  (tmp_path / 'texts').mkdir()
  for i in range(30):
    write(tmp_path / 'texts' / f'{i:02d}.jsonl', f'file {i:02d} ' * 10)
  text = opened(tokenizer, tmp_path / 'texts', shuffle=shuffle, num_sequences=8, token_cache=str(tmp_path / 'cache'))
  assert text.rows.about(8)[0]['tokens'] is None
  assert said(tokenizer, text.rows).startswith('file 00') != shuffle  # order of files: by name, or by hash
  found = [*(tmp_path / 'cache').glob('*/*.json')]
  assert 1 <= len(found) < 10


def test_held_out_rows_come_first_from_each_source(tmp_path, tokenizer):
  a, b = (write(tmp_path / f'{n}.jsonl', *(f'{n}{i:04d} ' for i in range(200))) for n in 'ab')
  text = opened(tokenizer, f'a={a}@3', f'b={b}@1', validates=True, validation_sequences=7, num_sequences=40)
  held, trained = (rows[np.arange(len(rows))] for rows in (text.held_out, text.rows))
  assert held.shape == (8, 8) and trained.shape == (40, 8)  # 7, rounded up to whole batches
  assert not {row.tobytes() for row in held} & {row.tobytes() for row in trained}
  assert sum('b' in tokenizer.decode(row) for row in held) == 2


def test_train_tokens_replace_num_sequences_and_may_repeat(tmp_path, tokenizer):
  path = write(tmp_path / 'a.jsonl', 'x' * 100)
  assert len(opened(tokenizer, path, train_tokens=100).rows) == 12  # 6 batches of 16 tokens
  rows = opened(tokenizer, path, train_tokens=480).rows
  assert len(rows) == 60 and rows.about(60)[0]['times'] == 5.0
  with pytest.raises(InputError, match=r'has 101 tokens, --num_sequences=60 of --seq_len=8 need 480'):
    opened(tokenizer, path, num_sequences=60)


def test_a_blend_has_its_weights_and_counts_repetitions(tmp_path, tokenizer):
  sizes = {'a': 4000, 'b': 4000, 'c': 80}
  paths = {name: write(tmp_path / f'{name}.jsonl', name * size) for name, size in sizes.items()}
  sources = [f'{n}={paths[n]}@{w}' for n, w in (('a', 0.6), ('b', 0.3), ('c', 0.1))]
  rows = opened(tokenizer, *sources, train_tokens=8000, shuffle=True).rows
  text = said(tokenizer, rows)
  for name, weight in (('a', 0.6), ('b', 0.3), ('c', 0.1)):
    assert abs(text.count(name) / len(text.replace('</s>', '')) - weight) < 0.01
  assert rows.about(1000)[2]['times'] == 10.0
