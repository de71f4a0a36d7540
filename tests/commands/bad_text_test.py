"""Bad texts, tokenizers and GGUF files are refused in one sentence that names flag or file, before any long work."""

import json
import pathlib
import types

import gguf
import numpy as np
import pytest
from refusal import edit_json
from refusal import refused
from tiny import config_of

from elder_jax.hf import families
from elder_jax.run import pipeline
from elder_jax.text import data

pytestmark = pytest.mark.usefixtures('no_long_work')


# ---- texts ----


def test_training_text_too_short(settings):
  message = refused(settings, '--train_data=', '--num_sequences=1000', '--seq_len=32', '32000', num_sequences=1000)
  assert settings['train_data'] in message


def test_window_longer_than_the_text(settings):
  refused(settings, '--eval_data=text', '--eval_seq_len=100000', eval_seq_len=100000, eval_tokens=0)
  refused(settings, '--eval_data=text', 'has 16 tokens', '--eval_seq_len=32', eval_tokens=16)


@pytest.mark.parametrize('flag', ['train_data', 'eval_data'])
@pytest.mark.parametrize(
  ('name', 'content', 'parts'),
  [
    ('absent.txt', None, ['no such file']),
    ('absent.jsonl', None, ['no such file']),
    ('absent.csv', None, ['.parquet']),
    ('x' * 300 + '.txt', None, ['no such file']),
    ('empty.txt', b'', ['is empty']),
    ('blank.txt', b'\n', ['tokens, ']),
    ('latin1.txt', b'caf\xe9 ' * 500, ['cannot be read', "can't decode byte 0xe9"]),
    ('empty.jsonl', b'', ['is empty']),
    ('broken.jsonl', b'{"text": "a"}\n{"text": ', ['cannot be read']),
    ('text.jsonl', b'just a text\nin two lines\n', ['cannot be read']),
    ('other.jsonl', b'{"body": "a", "id": 1}\n', ["no column 'text'", 'body', '--text_column']),
    ('numbers.jsonl', b'{"text": 1}\n{"text": 2}\n', ['--text_column', "'text'"]),
    ('lists.jsonl', b'{"text": ["a", "b"]}\n', ['--text_column', "'text'"]),
    ('foreign.parquet', b'PAR1 no parquet at all', ['cannot be read']),
    ('empty.parquet', b'', ['is empty']),
    ('image.png', b'\x89PNG\r\n', ['is not of a supported kind', '.parquet']),
    ('~no_such_user/a.txt', None, ['no such file']),
  ],
  ids=lambda v: v[:20] if isinstance(v, str) else '',
)
def test_text(settings, tmp_path, monkeypatch, flag, name, content, parts):
  for constants in ('huggingface_hub.constants', 'datasets.config'):
    monkeypatch.setattr(f'{constants}.HF_HUB_OFFLINE', True)
  path = name if name[0] in 'a~' and (':' in name or '/' in name) else str(tmp_path / name)
  if content is not None:
    (tmp_path / name).write_bytes(content)
  if flag == 'train_data':
    refused(settings, f'--train_data={path}', *parts, train_data=path)
  else:
    refused(settings, '--eval_data=news', *parts, eval_data=(f'news={path}',))


def test_hub_data_that_cannot_be_fetched(settings, monkeypatch):
  for constants in ('huggingface_hub.constants', 'datasets.config'):
    monkeypatch.setattr(f'{constants}.HF_HUB_OFFLINE', True)
  name = 'no-such-owner/no-such-data:en:train'
  refused(settings, f'--train_data={name}: cannot be read', train_data=name)


def test_unknown_text_column(settings, tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n')
  refused(settings, "'body'", "'text'", '--text_column', train_data=str(tmp_path / 'a.jsonl'), text_column='body')


def test_a_missing_broken_or_wrong_tokenizer(settings, model, monkeypatch):
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  refused(settings, 'no-such-owner/no-such', '--tokenizer', tokenizer='no-such-owner/no-such')
  tokenizer = json.loads((model / 'tokenizer.json').read_text())
  tokenizer['model']['vocab']['e'] = 300
  (model / 'tokenizer.json').write_text(json.dumps(tokenizer))
  refused(settings, '--train_data', 'token 300', '263', '--tokenizer')
  (model / 'tokenizer.json').write_text('{}')
  refused(settings, model, '--tokenizer')
  for path in model.glob('tokenizer*'):
    path.unlink()
  refused(settings, model, '--tokenizer')


def test_window_bos_without_a_bos_token(settings, model):
  edit_json(model / 'tokenizer_config.json', bos_token=None)
  refused(settings, '--bos=window', bos='window')


@pytest.mark.parametrize('kind, first', [('gemma3_text', 7), ('gemma2', 7), ('llama', None), ('qwen3', None)])
def test_bos_is_in_every_window_of_families_that_need_it(kind, first):
  bos_first = getattr(families.FAMILIES[kind], 'BOS_FIRST', False)
  tokenizer = types.SimpleNamespace(bos_token_id=7)
  assert data.bos_rule('auto', bos_first, tokenizer) == ('window' if first else 'tokenizer', first)
  assert data.bos_rule('none', bos_first, tokenizer) == ('none', None)


# ---- GGUF ----


def write_gguf(path: pathlib.Path, architecture='llama', drop=(), fields=(), tensors=(), types=()):
  """Writes a one-layer model of width 32, with fields and tensors dropped, changed or added."""
  d, f = 32, 64
  values = {
    'llama.context_length': 64,
    'llama.embedding_length': d,
    'llama.block_count': 1,
    'llama.feed_forward_length': f,
    'llama.attention.head_count': 4,
    'llama.attention.layer_norm_rms_epsilon': 1e-5,
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': ['<s>', 'a', 'b', 'ab'],
    'tokenizer.ggml.token_type': [3, 1, 1, 1],
    'tokenizer.ggml.merges': ['a b'],
    'tokenizer.ggml.bos_token_id': 0,
  }
  shapes = {
    'token_embd.weight': (4, d),
    'output_norm.weight': (d,),
    'blk.0.attn_norm.weight': (d,),
    'blk.0.attn_q.weight': (d, d),
    'blk.0.attn_k.weight': (d, d),
    'blk.0.attn_v.weight': (d, d),
    'blk.0.attn_output.weight': (d, d),
    'blk.0.ffn_norm.weight': (d,),
    'blk.0.ffn_gate.weight': (f, d),
    'blk.0.ffn_up.weight': (f, d),
    'blk.0.ffn_down.weight': (d, f),
  }
  values = {k: v for k, v in (values | dict(fields)).items() if k not in drop}
  arrays = {k: np.ones(s, dict(types).get(k, np.float32)) for k, s in (shapes | dict(tensors)).items() if k not in drop}
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in values.items():
    if isinstance(value, list):
      writer.add_array(key, value)
    else:
      add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
      add[type(value)](key, value)
  for name, array in arrays.items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.fixture
def small_gguf(tmp_path, settings) -> pathlib.Path:
  """The path of a GGUF file to write. `settings` point to it and need no text."""
  settings |= dict(
    model=str(tmp_path / 'small.gguf'),
    num_remove=None,
    remove_layers='',
    recipe='none',
    compare=[],
    train_data='',
    eval_data=(),
  )
  return tmp_path / 'small.gguf'


def test_the_undamaged_gguf_file_is_accepted(settings, small_gguf):
  write_gguf(small_gguf)
  assert pipeline.prepare(config_of(**settings)).source.num_layers == 1


@pytest.mark.parametrize(
  'damage',
  [
    lambda b: b'',
    lambda b: b'GGUF',
    lambda b: b'GGUF\x03\x00\x00\x00' + b'\xff' * 200,
    lambda b: b'Just a text, renamed.\n' * 20,
    lambda b: b[:30],
    lambda b: b[:400],
    lambda b: b[: len(b) // 2],
    lambda b: b[:-1000],
  ],
  ids=['empty', 'magic', 'garbage', 'text', 'header', 'fields', 'half', 'tail'],
)
def test_truncated_or_foreign_gguf(settings, no_text, small_gguf, damage):
  write_gguf(small_gguf)
  small_gguf.write_bytes(damage(small_gguf.read_bytes()))
  refused(settings, small_gguf, 'truncated or not a GGUF file')


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (dict(architecture='bert'), ["'bert'", 'llama']),
    (dict(tensors={'blk.0.attn_q.bias': (32,)}), ['blk.0.attn_q.bias']),
    (dict(tensors={'blk.1.attn_q.weight': (32, 32)}), ['blk.1.attn_q.weight']),
    (dict(tensors={'blk.0.attn_q.weight': (32, 64)}), ['model.layers.0.self_attn.q_proj.weight', '[32, 64]']),
    (dict(drop=['blk.0.attn_q.weight']), ['model.layers.0.self_attn.q_proj.weight', 'is missing']),
    (dict(types={'blk.0.attn_q.weight': np.int8}), ['blk.0.attn_q.weight', 'I8']),
    (dict(drop=['llama.block_count']), ['small.gguf', 'llama.block_count']),
    (dict(fields={'llama.block_count': 100_000}), ['small.gguf', 'block_count is 100000']),
    (dict(fields={'llama.block_count': 'one'}), ['small.gguf', "num_hidden_layers='one'"]),
    (dict(fields={'llama.block_count': 0}), ['small.gguf', 'num_hidden_layers=0']),
    (dict(fields={'llama.attention.head_count': [4, 4]}), ['small.gguf']),
    (dict(fields={'llama.embedding_length': 'wide'}), ['small.gguf']),
    (dict(fields={'llama.attention.layer_norm_rms_epsilon': 'small'}), ['small.gguf']),
    (dict(fields={'llama.rope.scaling.type': 'yarn'}), ['small.gguf', 'rope scaling', 'yarn']),
    (dict(tensors={'rope_freqs.weight': (3,)}), ['rope_freqs.weight']),
    (dict(fields={'tokenizer.ggml.model': 'bert'}), ['small.gguf', 'tokenizer bert/smollm']),
    (dict(fields={'tokenizer.ggml.pre': 'tekken'}), ['small.gguf', 'tokenizer gpt2/tekken']),
    (dict(drop=['tokenizer.ggml.merges']), ['small.gguf', 'vocabulary']),
    (dict(drop=['tokenizer.ggml.token_type']), ['small.gguf', 'vocabulary']),
    (dict(fields={'tokenizer.ggml.merges': ['a c']}), ['small.gguf', 'vocabulary']),
    (dict(fields={'tokenizer.ggml.bos_token_id': 99}), ['small.gguf', 'vocabulary']),
    (
      dict(drop=['tokenizer.ggml.bos_token_id'], fields={'tokenizer.ggml.add_bos_token': True}),
      ['small.gguf', 'vocabulary'],
    ),
  ],
  ids=lambda v: str(v)[:70] if isinstance(v, dict) else '',
)
def test_gguf(settings, no_text, small_gguf, changes, parts):
  write_gguf(small_gguf, **changes)
  refused(settings, *parts)
