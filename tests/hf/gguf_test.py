"""GGUF files as llama.cpp's converter writes them: the checkpoint and the tokenizer that they were made from."""

import json
import pathlib

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny import write_tiny_llama
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf.gguf import header
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.text import data

BOS, EOS, CONTROL, USER = '<s>', '</s>', '<|im_start|>', '<|tool|>'
TEXT = "He said: it's 1234567 naïve\n\n  cafés — 東京 🙂\t x1y22"
Type = gguf.GGMLQuantizationType


def _vocabulary():
  """A byte-level vocabulary: specials, the 256 bytes, and a few merged tokens, one of which no merge leads to."""
  from tokenizers import pre_tokenizers

  tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), '12', '123', '1234', 'it', 'whole', CONTROL, USER]
  normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  types = {BOS: control, EOS: control, CONTROL: control, USER: user}
  return tokens, [types.get(t, normal) for t in tokens], ['1 2', '12 3', '123 4', 'i t']


VOCAB = len(_vocabulary()[0])
SIZES = dict(
  vocab_size=VOCAB,
  hidden_size=64,
  intermediate_size=256,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.1,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=None,
  tie_word_embeddings=True,
)
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500000.0,
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
CASES = {
  'llama': dict(rope_theta=500000.0),
  'llama, untied': dict(tie_word_embeddings=False),
  'llama, narrow heads': dict(head_dim=12),  # 48 rows of q for a width of 64
  'llama, scaled': dict(rope_parameters=LLAMA3, head_dim=64),
  'qwen2': dict(rope_theta=1e6),
  'qwen2, untied': dict(tie_word_embeddings=False),
  'qwen3': dict(head_dim=24),
  'gemma3_text': dict(head_dim=24, query_pre_attn_scalar=24, num_hidden_layers=7, sliding_window=8),
  'gemma3_text, scaled': dict(
    head_dim=24,
    query_pre_attn_scalar=24,
    num_hidden_layers=7,
    sliding_window=8,
    rope_parameters={
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
    },
  ),
}
ARCHITECTURES = {'gemma3_text': 'gemma3'}

# What gguf-py's converter calls them.
COMMON = {
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'input_layernorm': 'attn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
}
LLAMA_NAMES = COMMON | {'post_attention_layernorm': 'ffn_norm'}
GEMMA_NAMES = COMMON | {
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
}


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
  """As llama.cpp's converter stores q and k of a Llama."""
  return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _converted(name: str, weight: np.ndarray, config: dict) -> tuple[str, np.ndarray]:
  kind = config['model_type']
  if kind == 'llama':
    for part, heads in (('q_proj', 'num_attention_heads'), ('k_proj', 'num_key_value_heads')):
      if part in name:
        weight = np.ascontiguousarray(_permuted(weight, config[heads]))
  if kind == 'gemma3_text' and 'norm' in name:
    weight = weight + 1
  name, what = name.rsplit('.', 1)
  names = GEMMA_NAMES if kind == 'gemma3_text' else LLAMA_NAMES
  if name.startswith('model.layers.'):
    _, _, l, part = name.split('.', 3)
    return f'blk.{l}.{names[part]}.{what}', weight
  return f'{names[name]}.{what}', weight


def write_gguf(
  path, folder, pre='smollm', add_bos=None, quantize=None, head_dim=True, vocabulary='bpe', fields=(), rename=(), **how
) -> pathlib.Path:
  """The folder's model as llama.cpp's converter writes it.

  quantize: (name, weight) -> Type, or None: as it is; fields: more of them, ARCH in a name is the architecture's; rename:
  of tokens; how: of gguf.GGUFWriter.
  """
  config = json.loads((folder / 'config.json').read_text())
  kind = config['model_type']
  writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind), **how)
  writer.add_context_length(config['max_position_embeddings'])
  writer.add_embedding_length(config['hidden_size'])
  writer.add_block_count(config['num_hidden_layers'])
  writer.add_feed_forward_length(config['intermediate_size'])
  writer.add_head_count(config['num_attention_heads'])
  writer.add_head_count_kv(config['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
  rope = config['rope_parameters']
  rope = rope.get('full_attention', rope)
  writer.add_rope_freq_base(rope['rope_theta'])
  if rope['rope_type'] == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope['factor'])
  if rope['rope_type'] == 'llama3':
    writer.add_tensor('rope_freqs.weight', llama3_divisors(rope, config['head_dim']))
  if head_dim and kind != 'qwen2':
    writer.add_key_length(config['head_dim'])
    writer.add_value_length(config['head_dim'])
  if kind == 'gemma3_text':
    writer.add_sliding_window(config['sliding_window'])
  writer.add_vocab_size(config['vocab_size'])
  if vocabulary == 'bpe':
    tokens, types, merges = _vocabulary()
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges(merges)
  else:
    tokens, types, scores = vocabulary
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_scores(scores)
    writer.add_unk_token_id(2)
    writer.add_add_space_prefix(pre == 'prefix')
  writer.add_token_list([dict(rename).get(token, token) for token in tokens])
  writer.add_token_types(types)
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_chat_template('{{ messages[0].content }}')
  if add_bos is not None:
    writer.add_add_bos_token(add_bos)
  for key, value in dict(fields).items():
    key = key.replace('ARCH', ARCHITECTURES.get(kind, kind))
    types = [gguf.GGUFValueType.get_type(v) for v in (value, *(value[:1] if isinstance(value, list) else ()))]
    writer.add_key_value(key, value, *types)
  for name, weight in safetensors.numpy.load_file(folder / 'model.safetensors').items():
    name, weight = _converted(name, weight, config)
    if quantize and weight.ndim == 2:
      writer.add_tensor(name, gguf.quantize(weight, quantize), raw_dtype=quantize)
    else:
      writer.add_tensor(name, weight)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def llama3_divisors(rope: dict, head_dim: int) -> np.ndarray:
  """As llama.cpp's converter computes them."""
  factors = []
  for i in range(0, head_dim, 2):
    wavelength = 2 * np.pi * rope['rope_theta'] ** (i / head_dim)
    context, low, high = rope['original_max_position_embeddings'], rope['low_freq_factor'], rope['high_freq_factor']
    if wavelength < context / high:
      factors.append(1)
    elif wavelength > context / low:
      factors.append(rope['factor'])
    else:
      smooth = (context / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(factors, np.float32)


def open_gguf_file(path: pathlib.Path) -> Source:
  return open_source(str(path), path.parent / 'files')


def load_torch(folder: pathlib.Path):
  """AutoModelForCausalLM, that nothing was missing for and nothing left over."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()


@pytest.fixture(scope='module', params=CASES)
def folder(request, tmp_path_factory) -> pathlib.Path:
  """A random model as transformers saves it; read only."""
  path, kind = tmp_path_factory.mktemp('model'), request.param.split(',')[0]
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(kind, **SIZES | CASES[request.param])
  model = transformers.AutoModelForCausalLM.from_config(config)
  for name, p in model.named_parameters():
    if p.ndim == 1:  # in steps of 1/64, so that 1 + w keeps every bit
      torch.nn.init.uniform_(p, -0.5, 0.5)
      p.data = (p.data * 64).round() / 64 + (0 if kind == 'gemma3_text' or 'bias' in name else 1)
  model.save_pretrained(path)
  return path


def test_gguf_is_the_checkpoint_it_was_made_from(folder, tmp_path):
  source, original = open_gguf_file(write_gguf(tmp_path / 'm.gguf', folder)), open_folder(folder)
  assert source.spec == original.spec and source.num_layers == original.num_layers
  assert source.shapes == original.shapes
  for name in original.shapes:
    np.testing.assert_array_equal(source.read(name), original.read(name), err_msg=name)
  # Saved, it is a Hugging Face folder that transformers reads.
  (tmp_path / 'out').mkdir()
  model = load_model(source, 'float32')
  save_model(pieces_of_model(model), source, list(range(source.num_layers)), tmp_path / 'out', 'float32', int(5e9))
  tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (2, 24), np.int32)
  with torch.no_grad():
    got, expected = (load_torch(f)(torch.tensor(tokens_BT.astype(int))).logits for f in (tmp_path / 'out', folder))
  np.testing.assert_array_equal(got, expected)
  ours = jax.jit(lambda m, t: logits_of(m, forward(m, t)[0]))(model, tokens_BT)
  np.testing.assert_allclose(ours, expected, atol=1e-5 * max(1, float(expected.abs().max())))
  tokenizer = data.load_tokenizer(str(tmp_path / 'out'))
  assert tokenizer(TEXT).input_ids == data.load_tokenizer(str(tmp_path / 'files'))(TEXT).input_ids


def open_folder(path: pathlib.Path) -> Source:
  return open_source(str(path), path / 'scratch')


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1'])
def test_quantised_types(kind, two_layers, tmp_path):
  kind = Type[kind]
  source = open_gguf_file(write_gguf(tmp_path / 'm.gguf', two_layers, quantize=kind, head_dim=False))
  original = open_folder(two_layers)
  assert source.spec == original.spec and source.shapes == original.shapes
  for name in source.shapes:
    exact = original.read(name)
    # Blocks lie within rows, and only rows are reordered: quantisation and the order of rows commute.
    expected = gguf.dequantize(gguf.quantize(exact, kind), kind) if exact.ndim == 2 else exact
    np.testing.assert_array_equal(source.read(name), expected)
    np.testing.assert_allclose(source.read(name), exact, atol=np.abs(exact).max() / 7)
    assert exact.ndim == 1 or (source.read(name) != exact).any()
  assert load_model(source, 'bfloat16').embed[...].dtype == 'bfloat16'


@pytest.mark.parametrize('kind', ['Q4_K', 'Q5_K', 'Q6_K'])
def test_k_quants(kind, tmp_path):
  """Blocks of random bytes with scales of about 1, as the gguf package, which cannot make such, reads them."""
  kind, width = Type[kind], 256
  folder = write_tiny_llama(tmp_path / 'in', vocab_size=VOCAB, intermediate_size=width, num_hidden_layers=1)
  path = write_gguf(tmp_path / 'plain.gguf', folder)
  _, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = np.random.default_rng(0).integers(0, 256, (32, size), np.uint8)
  halves = [(size - 2, size)] if kind == Type.Q6_K else [(0, 2), (2, 4)]
  for low, high in halves:
    blocks[:, low:high] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
  reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  for field in reader.fields.values():
    if not field.name.startswith('GGUF.') and field.name != 'general.architecture':
      sub = field.types[1] if len(field.types) > 1 else None
      writer.add_key_value(field.name, field.contents(), field.types[0], sub)
  for tensor in reader.tensors:
    if tensor.name == 'blk.0.ffn_down.weight':
      writer.add_tensor(tensor.name, blocks, raw_dtype=kind)
    else:
      writer.add_tensor(tensor.name, np.array(tensor.data))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  got = open_gguf_file(tmp_path / 'm.gguf').read('model.layers.0.mlp.down_proj.weight')
  np.testing.assert_array_equal(got, gguf.dequantize(blocks, kind))
  assert got.shape == (32, width) and np.isfinite(got).all() and got.std() > 0


@pytest.mark.parametrize('alignment', [32, 128])
def test_the_head_is_read_as_the_gguf_package_reads_it(tmp_path, alignment):
  path, kind = tmp_path / 'm.gguf', gguf.GGUFValueType
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_custom_alignment(alignment)
  whole = {kind.UINT8: 255, kind.INT8: -128, kind.UINT16: 65535, kind.INT16: -32768, kind.UINT32: 2**32 - 1}
  whole |= {kind.INT32: -(2**31), kind.UINT64: 2**64 - 1, kind.INT64: -(2**63)}
  values = whole | {kind.FLOAT32: 0.1, kind.FLOAT64: 0.1, kind.BOOL: True, kind.STRING: 'naïve 東京'}
  for of, value in values.items():
    writer.add_key_value(f'one.{of.name}', value, of)
    writer.add_key_value(f'many.{of.name}', [value, value], kind.ARRAY, of)
  rng = np.random.default_rng(0)
  for name, shape, dtype in (('a', (3,), np.float32), ('b', (2, 3, 5), np.float16), ('c', (2, 4), np.float64)):
    writer.add_tensor(name, rng.normal(size=shape).astype(dtype))
  writer.add_tensor('d', gguf.quantize(rng.normal(size=(3, 64)).astype(np.float32), Type.Q8_0), raw_dtype=Type.Q8_0)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()

  fields, tensors = header.read(path)
  reader = gguf.GGUFReader(path)
  assert fields == {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
  assert [t[:3] for t in tensors] == [(t.name, tuple(t.shape.tolist()), t.tensor_type) for t in reader.tensors]
  for ours, theirs in zip(tensors, reader.tensors):

    def octets(a):
      return np.ascontiguousarray(a).view(np.uint8)

    np.testing.assert_array_equal(octets(ours.data), octets(theirs.data))
    if ours.name != 'c':  # of which no weights are
      np.testing.assert_array_equal(
        gguf.dequantize(ours.data, ours.tensor_type), gguf.dequantize(theirs.data, theirs.tensor_type)
      )


@pytest.mark.parametrize('alignment', [0, 24, -32, 'wide'])
def test_an_alignment_that_is_none_is_refused(tmp_path, alignment):
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  writer.add_key_value(
    'general.alignment',
    *((alignment, gguf.GGUFValueType.STRING) if alignment == 'wide' else (alignment, gguf.GGUFValueType.INT32)),
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(InputError, match=r'm\.gguf: .*general.alignment is no power of two'):
    open_gguf_file(tmp_path / 'm.gguf')


def test_other_rope_frequencies_than_llama3s_are_refused(tmp_path):
  folder = write_tiny_llama(tmp_path / 'in', vocab_size=VOCAB, head_dim=64, rope_parameters=LLAMA3)
  config = json.loads((folder / 'config.json').read_text())
  config['rope_parameters']['low_freq_factor'] = 2.0
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(InputError, match='rope_freqs.weight'):
    open_gguf_file(write_gguf(tmp_path / 'm.gguf', folder))


def test_a_tensors_name_of_more_than_one_line_is_told_in_one(two_layers, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', two_layers)
  path.write_bytes(path.read_bytes().replace(b'blk.1.attn_norm', b'blk\n1.attn_\x1borm'))
  with pytest.raises(InputError, match=r'GGUF tensor blk\\n1.attn_\\x1borm.weight is not known for llama; use'):
    open_gguf_file(path)


# ---- tokenizers ----


@pytest.fixture(scope='module')
def two_layers(tmp_path_factory) -> pathlib.Path:
  return write_tiny_llama(tmp_path_factory.mktemp('two'), vocab_size=VOCAB, intermediate_size=64, num_hidden_layers=2)


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
  names, _, _ = _vocabulary()
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
  # Only Llama 3's rule takes a word that is in the vocabulary although no merges lead to it.
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
  """As sentencepiece joins: the best score first, not the longest; what is no piece goes by its bytes."""
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
  for text in ('abc ab. é', '東  京', *([] if prefix else ['a\n\nc'])):  # after an added token comes a prefix, too
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
