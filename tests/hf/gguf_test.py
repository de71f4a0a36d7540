"""Weights read from GGUF files equal those of the checkpoint that the file was made from, for every type."""

import json
import pathlib

import gguf
from gguf_files import CASES
from gguf_files import LLAMA3
from gguf_files import SIZES
from gguf_files import TEXT
from gguf_files import VOCAB
from gguf_files import Type
from gguf_files import open_folder
from gguf_files import open_gguf_file
from gguf_files import write_gguf
import jax
import numpy as np
import pytest
from tiny import write_tiny_llama
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf.gguf import header
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.text import data


def load_torch(folder: pathlib.Path):
  """AutoModelForCausalLM, with no tensor missing and none left over."""
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


def test_gguf_equals_the_checkpoint_it_was_made_from(folder, tmp_path):
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
  """Blocks of random bytes with small scales, because the gguf package reads these types but cannot write them."""
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
def test_the_header_is_read_as_by_the_gguf_package(tmp_path, alignment):
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

    def raw(a):
      return np.ascontiguousarray(a).view(np.uint8)

    np.testing.assert_array_equal(raw(ours.data), raw(theirs.data))
    if ours.name != 'c':  # float64, which no weights have
      np.testing.assert_array_equal(
        gguf.dequantize(ours.data, ours.tensor_type), gguf.dequantize(theirs.data, theirs.tensor_type)
      )


@pytest.mark.parametrize('alignment', [0, 24, -32, 'wide'])
def test_an_invalid_alignment_is_refused(tmp_path, alignment):
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
  writer.add_key_value(
    'general.alignment',
    *((alignment, gguf.GGUFValueType.STRING) if alignment == 'wide' else (alignment, gguf.GGUFValueType.INT32)),
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  with pytest.raises(InputError, match=r'm\.gguf: .*general.alignment is not a power of two'):
    open_gguf_file(tmp_path / 'm.gguf')


def test_other_rope_frequencies_than_llama3s_are_refused(tmp_path):
  folder = write_tiny_llama(tmp_path / 'in', vocab_size=VOCAB, head_dim=64, rope_parameters=LLAMA3)
  config = json.loads((folder / 'config.json').read_text())
  config['rope_parameters']['low_freq_factor'] = 2.0
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(InputError, match='rope_freqs.weight'):
    open_gguf_file(write_gguf(tmp_path / 'm.gguf', folder))


def test_control_characters_in_a_tensors_name_are_escaped(two_layers, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', two_layers)
  path.write_bytes(path.read_bytes().replace(b'blk.1.attn_norm', b'blk\n1.attn_\x1borm'))
  with pytest.raises(InputError, match=r'GGUF tensor blk\\n1.attn_\\x1borm.weight is not known for llama; use'):
    open_gguf_file(path)
