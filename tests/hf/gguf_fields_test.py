"""The metadata of GGUF files: every field is read as in llama.cpp, known to be harmless, or refused by name."""

import json
import pathlib
import shutil

from gguf_files import BOS
from gguf_files import CONTROL
from gguf_files import FAMILIES
from gguf_files import VOCAB
from gguf_files import open_folder
from gguf_files import open_gguf_file
from gguf_files import write_gguf
import pytest
from refusal import edit_json
from refusal import one_sentence

from elder_jax.errors import InputError
from elder_jax.text import data

# Fields in files of Llama 3, Qwen2.5, Qwen3 and Gemma 3, as convert_hf_to_gguf.py and publishers write them.
ANYWHERE = {
  'general.type': 'model',
  'general.name': 'Tiny',
  'general.finetune': 'Instruct',
  'general.basename': 'Tiny',
  'general.size_label': '1B',
  'general.license': 'llama3.1',
  'general.license.name': 'x',
  'general.license.link': 'x',
  'general.base_model.count': 1,
  'general.base_model.0.name': 'Tiny',
  'general.base_model.0.organization': 'Own',
  'general.base_model.0.repo_url': 'x',
  'general.tags': ['a', 'b'],
  'general.languages': ['en'],
  'general.author': 'x',
  'general.version': 'v1',
  'general.organization': 'x',
  'general.description': 'x',
  'general.quantized_by': 'x',
  'general.repo_url': 'x',
  'general.url': 'x',
  'general.source.url': 'x',
  'general.source.huggingface.repository': 'x',
  'general.datasets': ['a'],
  'general.sampling.top_k': 20,
  'general.sampling.temp': 0.7,
  'general.file_type': 7,
  'general.quantization_version': 2,
  'general.uuid': 'x',
  'quantize.imatrix.file': 'x',
  'quantize.imatrix.dataset': 'x',
  'quantize.imatrix.entries_count': 1,
  'quantize.imatrix.chunks_count': 1,
  'mradermacher.quantize_version': '2',
  'tokenizer.ggml.scores': [0.0] * VOCAB,
  'tokenizer.ggml.padding_token_id': 1,
  'tokenizer.ggml.eot_token_id': 1,
  'tokenizer.ggml.eom_token_id': 1,
  'tokenizer.ggml.add_eos_token': False,
  'tokenizer.ggml.add_sep_token': False,
  'tokenizer.ggml.add_bos_token': False,
  'tokenizer.ggml.add_space_prefix': False,
  'tokenizer.ggml.unknown_token_id': 0,
  'tokenizer.ggml.seperator_token_id': 1,
  'tokenizer.ggml.mask_token_id': 1,
  'tokenizer.ggml.prefix_token_id': 1,
  'tokenizer.ggml.fim_pre_token_id': 1,
  'tokenizer.ggml.fim_rep_token_id': 1,
  'tokenizer.huggingface.json': '{}',
}
OF_FAMILY = {
  'llama': {
    'ARCH.rope.dimension_count': 16,
    'ARCH.tensor_data_layout': 'Meta AI original pth',
    'ARCH.rope.scaling.type': 'none',
    'ARCH.expert_count': 0,
    'ARCH.expert_used_count': 0,
    'ARCH.rope.scaling.finetuned': False,
  },
  'qwen2': {'ARCH.rope.dimension_count': 16, 'ARCH.rope.scaling.factor': 1.0},
  'qwen3': {'ARCH.rope.dimension_count': 24, 'ARCH.pooling_type': 3},
  'gemma3_text': {
    'ARCH.rope.freq_base_swa': 10000.0,
    'ARCH.rope.scaling.factor': 0.0,
    'ARCH.final_logit_softcapping': 0.0,
    'ARCH.attention.sliding_window_pattern': 6,
  },
}


@pytest.mark.parametrize('kind', FAMILIES)
def test_fields_of_published_files_are_known(kind, folders, tmp_path):
  source = open_gguf_file(write_gguf(tmp_path / 'm.gguf', folders[kind], fields=ANYWHERE | OF_FAMILY[kind]))
  assert source.spec == open_folder(folders[kind]).spec


@pytest.mark.parametrize(
  'fields',
  [
    {'ARCH.rope.scaling.type': 'linear', 'ARCH.rope.scaling.factor': 4.0},
    {'ARCH.rope.scaling.factor': 4.0},
    {'ARCH.rope.scale_linear': 4.0},
    {'ARCH.rope.scale_linear': 9.0, 'ARCH.rope.scaling.factor': 4.0},
  ],
  ids=str,
)
@pytest.mark.parametrize('kind', FAMILIES)
def test_a_rope_factor_without_a_type_is_linear(kind, fields, folders, tmp_path):
  """Linear is llama.cpp's default type; scale_linear is the old name of the factor."""
  linear = shutil.copytree(folders[kind], tmp_path / 'in')
  rope = json.loads((linear / 'config.json').read_text())['rope_parameters']
  rope.get('full_attention', rope).update(rope_type='linear', factor=4.0)
  edit_json(linear / 'config.json', rope_parameters=rope)
  spec = open_gguf_file(write_gguf(tmp_path / 'm.gguf', folders[kind], fields=fields)).spec
  assert spec == open_folder(linear).spec != open_folder(folders[kind]).spec


def test_a_rope_factor_of_type_none_scales_nothing(folders, tmp_path):
  fields = {'ARCH.rope.scaling.type': 'none', 'ARCH.rope.scaling.factor': 4.0}
  source = open_gguf_file(write_gguf(tmp_path / 'm.gguf', folders['llama'], fields=fields))
  assert source.spec == open_folder(folders['llama']).spec


def test_gemma_3_reads_window_pattern_local_base_and_cap(folders, tmp_path):
  config = {'sliding_window_pattern': 2, 'final_logit_softcapping': 30.0, 'layer_types': None}
  folder = shutil.copytree(folders['gemma3_text'], tmp_path / 'in')
  rope = json.loads((folder / 'config.json').read_text())['rope_parameters']
  rope['sliding_attention']['rope_theta'] = 5000.0
  edit_json(folder / 'config.json', **config, rope_parameters=rope)
  fields = {
    'ARCH.attention.sliding_window_pattern': 2,
    'ARCH.final_logit_softcapping': 30.0,
    'ARCH.rope.freq_base_swa': 5000.0,
  }
  spec = open_gguf_file(write_gguf(tmp_path / 'm.gguf', folders['gemma3_text'], fields=fields)).spec
  assert spec == open_folder(folder).spec != open_folder(folders['gemma3_text']).spec


def test_the_default_head_width_is_llama_cpps(folders, tmp_path):
  """embedding_length / head_count in every architecture, unlike in transformers."""
  for kind in ('qwen3', 'gemma3_text'):
    with pytest.raises(InputError, match=r'q_proj.weight has shape \[96, 64\], config.json requires \[64, 64\]'):
      open_gguf_file(write_gguf(tmp_path / f'{kind}.gguf', folders[kind], head_dim=False))


REFUSED = {
  'ARCH.rope.scaling.type': 'yarn',
  'ARCH.rope.scaling.attn_factor': 1.5,
  'ARCH.rope.scaling.yarn_ext_factor': 1.0,
  'ARCH.rope.dimension_count': 8,
  'ARCH.attention.value_length': 8,
  'ARCH.rope.global.freq_base': 1e6,
  'ARCH.expert_count': 8,
  'ARCH.attention.sliding_window': 4096,
  'ARCH.attention.causal': False,
  'ARCH.attn_logit_softcapping': 50.0,
  'ARCH.final_logit_softcapping': 30.0,
  'ARCH.attention.scale': 0.5,
  'ARCH.logit_scale': 0.5,
  'ARCH.residual_scale': 0.5,
  'ARCH.embedding_scale': 12.0,
  'ARCH.use_parallel_residual': True,
  'ARCH.tensor_data_layout': 'other',
  'ARCH.nextn_predict_layers': 1,
  'ARCH.rope.freq_base_swa': 1e4,
  'ARCH.classifier.output_labels': ['a', 'b'],
  'ARCH.not_yet_invented': 1,
  'tokenizer.ggml.not_yet_invented': 1,
  'tokenizer.ggml.add_sep_token': True,
  'tokenizer.ggml.remove_extra_whitespaces': True,
  'tokenizer.other': 'x',
}


@pytest.mark.parametrize('key', REFUSED)
def test_a_field_that_may_change_the_computation_is_refused(key, folders, tmp_path):
  fields = {key: REFUSED[key]}
  path = write_gguf(tmp_path / 'm.gguf', folders['llama'], fields=fields, head_dim=key != 'ARCH.attention.value_length')
  with pytest.raises(InputError) as caught:
    open_gguf_file(path)
  name = 'rope scaling' if key == 'ARCH.rope.scaling.type' else key.removeprefix('ARCH.')
  one_sentence(caught.value.for_command(), path, name, 'Hugging Face folder')


def test_all_unknown_fields_are_named_together(folders, tmp_path):
  fields = {'ARCH.one': 1, 'tokenizer.two': 'x' * 99, 'ARCH.three': [3]}
  path = write_gguf(tmp_path / 'm.gguf', folders['qwen3'], fields=fields)
  with pytest.raises(InputError) as caught:
    open_gguf_file(path)
  one_sentence(caught.value.for_command(), 'qwen3.one=1, tokenizer.two=xxx', 'qwen3.three=[3]')
  assert 'x' * 41 not in str(caught.value)


def test_a_value_per_layer_is_refused(folders, tmp_path):
  path = tmp_path / 'm.gguf'
  write_gguf(path, folders['llama'], fields={'ARCH.rope.scaling.factor': [1.0, 2.0]})
  with pytest.raises(InputError, match=r'llama.rope.scaling.factor has a value per layer, only a single value'):
    open_gguf_file(path)


def test_an_impossible_size_is_refused(folders, tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', folders['llama'])
  name = b'llama.embedding_length'
  at = path.read_bytes().index(name) + len(name) + 4  # the value follows the type
  content = path.read_bytes()
  path.write_bytes(content[:at] + b'\xff\xff\xff\xff' + content[at + 4 :])
  with pytest.raises(InputError, match=f'llama.embedding_length is {2**32 - 1}, which is larger than in any model'):
    open_gguf_file(path)


# ---- tokens that end a text ----


def generation_config(path: pathlib.Path) -> dict:
  open_gguf_file(path)
  return json.loads((path.parent / 'files' / 'generation_config.json').read_text())


def test_end_of_turn_tokens_end_generation(folders, tmp_path):
  def write(**how):
    return generation_config(write_gguf(tmp_path / 'm.gguf', folders['llama'], **how))

  im_start, tool = VOCAB - 2, VOCAB - 1
  assert write() == {'bos_token_id': 0, 'eos_token_id': 1}
  fields = {'tokenizer.ggml.eot_token_id': tool, 'tokenizer.ggml.eom_token_id': im_start}
  assert write(fields=fields)['eos_token_id'] == [1, tool, im_start]
  fields = {'tokenizer.ggml.eos_token_ids': [tool, 1], 'tokenizer.ggml.eot_token_id': 1}
  assert write(fields=fields)['eos_token_id'] == [1, tool]
  for text in ('<|eot_id|>', '<|im_end|>', '<end_of_turn>', '<|endoftext|>', '<|eom_id|>'):
    assert write(rename={CONTROL: text})['eos_token_id'] == [1, im_start], text
  with pytest.raises(
    InputError, match=r'vocabulary is invalid \(the end tokens \[1, 999\] are not all in the vocabulary\)'
  ):
    write(fields={'tokenizer.ggml.eot_token_id': 999})


def test_eos_is_added_and_further_templates_are_kept(folders, tmp_path):
  fields = {
    'tokenizer.ggml.add_eos_token': True,
    'tokenizer.ggml.add_bos_token': True,
    'tokenizer.chat_templates': ['tool_use'],
    'tokenizer.chat_template.tool_use': 'tools: {{ messages[0].content }}',
  }
  open_gguf_file(write_gguf(tmp_path / 'm.gguf', folders['llama'], fields=fields))
  tokenizer = data.load_tokenizer(str(tmp_path / 'files'))
  assert tokenizer('a').input_ids == [0, *tokenizer('a', add_special_tokens=False).input_ids, 1]

  def chat(**how):
    return tokenizer.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False, **how)

  assert chat() == 'hi' and chat(chat_template='tool_use') == 'tools: hi'
  assert tokenizer.bos_token == BOS
