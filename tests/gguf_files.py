"""Writes GGUF files like llama.cpp's converter, from the folder of a tiny model."""

import json
import pathlib

import gguf
import numpy as np
import safetensors.numpy

from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source

BOS, EOS, CONTROL, USER = '<s>', '</s>', '<|im_start|>', '<|tool|>'
TEXT = "He said: it's 1234567 naïve\n\n  cafés — 東京 🙂\t x1y22"
Type = gguf.GGMLQuantizationType


def bpe_vocabulary():
  """A byte-level vocabulary: special tokens, the 256 bytes, and a few merged tokens, one of which no merge produces."""
  from tokenizers import pre_tokenizers

  tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), '12', '123', '1234', 'it', 'whole', CONTROL, USER]
  normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
  types = {BOS: control, EOS: control, CONTROL: control, USER: user}
  return tokens, [types.get(t, normal) for t in tokens], ['1 2', '12 3', '123 4', 'i t']


VOCAB = len(bpe_vocabulary()[0])
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
  'llama, narrow heads': dict(head_dim=12),  # q has 48 rows, the model width is 64
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
FAMILIES = ['llama', 'qwen2', 'qwen3', 'gemma3_text']
ARCHITECTURES = {'gemma3_text': 'gemma3'}

# Hugging Face name -> name in GGUF.
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
  """Permutes rows of q or k like llama.cpp's converter does for Llama."""
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
  """Writes the model of a folder like llama.cpp's converter.

  Args:
    quantize: Quantisation of matrices; None: unchanged.
    fields: More GGUF fields. ARCH in a name becomes the architecture.
    rename: {token: new name}.
    how: Arguments of gguf.GGUFWriter.
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
    tokens, types, merges = bpe_vocabulary()
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
  """Returns the divisors of Llama 3's RoPE frequencies, computed like in llama.cpp's converter."""
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


def open_folder(path: pathlib.Path) -> Source:
  return open_source(str(path), path / 'scratch')
