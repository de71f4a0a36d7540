"""Split GGUF files are read as one model; errors for other kinds of files name the kind."""

import pathlib
import shutil

import gguf
from gguf_files import VOCAB
from gguf_files import open_gguf_file
from gguf_files import write_gguf
import pytest
from refusal import one_sentence
from tiny import write_tiny_llama

from elder_jax.errors import InputError
from elder_jax.hf import folder as model_folder
from elder_jax.hf.source import open_source


def refused_file(path: pathlib.Path, *parts):
  with pytest.raises(InputError) as caught:
    open_gguf_file(path)
  one_sentence(caught.value.for_command(), *parts)
  assert 'truncated' not in str(caught.value) and 'fetch it again' not in str(caught.value)


def test_parts_of_a_split_file_are_one_model(tmp_path):
  folder = write_tiny_llama(tmp_path / 'in', vocab_size=VOCAB, num_hidden_layers=2)
  whole = write_gguf(tmp_path / 'whole.gguf', folder)
  write_gguf(tmp_path / 'm.gguf', folder, split_max_tensors=8)
  parts = sorted(tmp_path.glob('m-*.gguf'))
  assert [p.name for p in parts] == [f'm-0000{i}-of-00003.gguf' for i in (1, 2, 3)]
  expected = open_gguf_file(whole)
  for path in parts:
    source = open_gguf_file(path)
    assert (source.spec, source.shapes) == (expected.spec, expected.shapes)
    for name in source.shapes:
      assert (source.read(name) == expected.read(name)).all(), name
  shutil.copy(parts[0], tmp_path / 'renamed.gguf')
  refused_file(tmp_path / 'renamed.gguf', 'renamed.gguf', 'one of 3 parts', 'llama-gguf-split --merge')
  shutil.copy(parts[1], parts[2])
  with pytest.raises(InputError, match='3 parts of this split GGUF file belong to different files'):
    open_gguf_file(parts[0])
  parts[2].unlink()
  refused_file(parts[0], parts[2], 'is missing', 'one of 3 parts')


def test_a_big_endian_file_is_named(folders, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', folders['llama'], endianess=gguf.GGUFEndian.BIG)
  refused_file(path, path, 'big-endian', 'gguf-convert-endian m.gguf little')


def test_other_versions_and_formats_are_named(folders, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', folders['llama'])
  content = path.read_bytes()
  path.write_bytes(content[:4] + b'\1\0\0\0' + content[8:])
  refused_file(path, 'GGUF version 1')
  path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n')
  refused_file(path, 'Git LFS pointer', 'git lfs pull')
  path.write_bytes(b'tjgg' + content[4:])
  refused_file(path, 'older than GGUF')


def test_an_unknown_quantisation_is_named(folders, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', folders['llama'])
  name = b'blk.0.ffn_down.weight'
  # The type follows the name, the number of dimensions and both dimensions.
  content, offset = path.read_bytes(), len(name) + 4 + 2 * 8
  at = content.index(name) + offset
  assert content[at : at + 4] == bytes(4)  # F32
  path.write_bytes(content[:at] + (144).to_bytes(4, 'little') + content[at + 4 :])  # a type of ik_llama.cpp
  refused_file(path, path, 'blk.0.ffn_down.weight', 'quantisation type 144', "a fork's", 'Q8_0')


@pytest.mark.parametrize(
  ('fields', 'architecture', 'what'),
  [
    ({'general.type': 'adapter', 'adapter.type': 'lora', 'adapter.lora.alpha': 16.0}, 'llama', 'LoRA adapter'),
    ({'general.type': 'mmproj'}, 'clip', 'image or audio part'),
    ({}, 'clip', 'image or audio part'),
    ({'general.type': 'imatrix', 'imatrix.chunk_count': 1}, 'llama', 'importance matrix'),
    ({}, 'controlvector', 'control vector'),
  ],
)
def test_a_file_that_is_no_model_is_named(fields, architecture, what, tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', architecture)
  for key, value in fields.items():
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  refused_file(tmp_path / 'm.gguf', 'm.gguf', what, 'give the')


def test_the_suffix_may_be_in_capitals_and_a_folder_is_no_gguf_file(folders, tmp_path):
  write_gguf(tmp_path / 'M.GGUF', folders['llama'])
  assert open_gguf_file(tmp_path / 'M.GGUF').num_layers == 1
  folder = shutil.copytree(folders['llama'], tmp_path / 'folder.gguf')
  assert not model_folder.is_gguf(str(folder)) and open_source(str(folder), tmp_path / 's').num_layers == 1
