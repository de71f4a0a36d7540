"""Tokenizers read from GGUF files split texts like the ones that they were made from."""

import gguf
from gguf_files import BOS
from gguf_files import CONTROL
from gguf_files import EOS
from gguf_files import TEXT
from gguf_files import USER
from gguf_files import bpe_vocabulary
from gguf_files import open_gguf_file
from gguf_files import write_gguf
import pytest
from tiny import write_tiny_llama

from elder_jax.text import data


@pytest.fixture
def tokenizer_of(two_layers, tmp_path):
  def load(**how):
    path = write_gguf(tmp_path / 'm.gguf', two_layers, **how)
    open_gguf_file(path)
    return data.load_tokenizer(str(tmp_path / 'files'))

  return load


@pytest.mark.parametrize('pre', ['gpt-2', 'smollm', 'llama-bpe', 'qwen2'])
def test_gguf_tokenizer_round_trip(pre, tokenizer_of):
  tokenizer = tokenizer_of(pre=pre, add_bos=False)
  ids = tokenizer(TEXT).input_ids
  assert tokenizer.decode(ids) == TEXT
  names, _, _ = bpe_vocabulary()
  assert len(tokenizer) == len(names) and tokenizer.convert_ids_to_tokens(range(len(names))) == names
  assert names.index('it') in ids  # merges are there

  def split(text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

  digits = {
    'gpt-2': ['1234', '5'],
    'smollm': ['1', '2', '3', '4', '5'],
    'llama-bpe': ['123', '4', '5'],
    'qwen2': list('12345'),
  }
  assert split('12345') == digits[pre]
  # Only Llama 3's rule keeps a word of the vocabulary to which no merges lead.
  assert split('whole') == (['whole'] if pre == 'llama-bpe' else list('whole'))
  # No space is put before the text.
  assert split('a b') == ['a', 'Ġ', 'b'] and tokenizer.decode(tokenizer(' a').input_ids) == ' a'

  special = tokenizer(f'x{CONTROL}y{USER}z').input_ids
  assert special == [names.index(t) for t in ('x', CONTROL, 'y', USER, 'z')]
  assert tokenizer.decode(special, skip_special_tokens=True) == f'xy{USER}z'
  assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
  chat = tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)
  assert chat == 'hi'


@pytest.mark.parametrize(
  'pre, add_bos, expected',
  [
    ('smollm', True, True),
    ('smollm', False, False),
    ('smollm', None, False),
    ('gpt-2', None, False),
    ('llama-bpe', True, True),
    ('llama-bpe', False, False),
    ('llama-bpe', None, True),
    ('qwen2', None, False),
  ],
)
def test_gguf_begin_of_sequence(pre, add_bos, expected, tokenizer_of):
  tokenizer = tokenizer_of(pre=pre, add_bos=add_bos)
  ids = tokenizer('hello').input_ids
  assert (ids[0] == 0) == expected and len(ids) == 5 + expected and 0 not in ids[1:]
  assert tokenizer('hello', add_special_tokens=False).input_ids == ids[expected:]


PIECES = ['▁', 'a', 'b', 'c', 'ab', 'bc', '▁a', '▁ab', 'abc', '▁▁', 'é', '.']


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece(prefix, tmp_path):
  """Merges follow the best score, not the longest piece; unknown characters fall back to bytes."""
  Kind = gguf.TokenType
  tokens = ['<s>', '</s>', '<unk>', '<|user|>', '\n\n', *(f'<0x{b:02X}>' for b in range(256)), *PIECES]
  kinds = [Kind.CONTROL] * 2 + [Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED]
  kinds += [Kind.BYTE] * 256 + [Kind.NORMAL] * len(PIECES)
  scores = [0.0] * 261 + [-100.0 + i if len(p) == 1 else -float(i) for i, p in enumerate(PIECES)]
  scores[tokens.index('bc')] = -1.5  # before ab
  folder = tmp_path / 'in'
  write_tiny_llama(folder, vocab_size=len(tokens), num_hidden_layers=1)
  how = dict(pre='prefix' if prefix else '', vocabulary=(tokens, kinds, scores))
  open_gguf_file(write_gguf(tmp_path / 'm.gguf', folder, **how))
  tokenizer = data.load_tokenizer(str(tmp_path / 'files'))

  def split(text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

  assert split('abc')[:1] == ['<s>'] and split('abc')[1:] == (['▁a', 'bc'] if prefix else ['abc'])
  assert split('ab')[1:] == (['▁ab'] if prefix else ['ab'])
  assert split('c  b')[-3:] == ['c', '▁▁', 'b']
  assert split('c東')[-4:] == ['c', '<0xE6>', '<0x9D>', '<0xB1>']
  after = split('a\n\nb<|user|>c')
  assert '\n\n' in after and '<|user|>' in after and after.index('\n\n') < after.index('<|user|>')
  for text in ('abc ab. é', '東  京', *([] if prefix else ['a\n\nc'])):  # after an added token, a prefix is added again
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
