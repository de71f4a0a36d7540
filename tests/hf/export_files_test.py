"""The small files of an export: those of the source that also hold for the pruned model, and the tokenizer."""

import json
import pathlib
import shutil

import pytest
from refusal import edit_json
from refusal import refused
from tiny import config_of
from tiny import write_tiny_llama
from tiny import write_tokenizer
import transformers

from elder_jax.errors import InputError
from elder_jax.hf import folder as model_folder
from elder_jax.hf import manifest
from elder_jax.run import pipeline

COPIED = (
  'tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt tokenizer.model '
  'qwen.tiktoken tekken.json sentencepiece.bpe.model spiece.model vocab.txt words-of-no-known-name.dict '
  'chat_template.jinja additional_chat_templates/tool_use.jinja generation_config.json preprocessor_config.json '
  'processor_config.json configuration.json LICENSE LICENSE.md license.txt NOTICE Notice.txt USE_POLICY.md '
  'a_name|with?odd*characters.txt'
).split()
SKIPPED = (
  'README.md readme.MD SHA256SUMS config.json.bak.pt model.safetensors.index.json pytorch_model.bin.index.json '
  'pytorch_model.bin consolidated.00.pth params.json quantize_config.json hf_quant_config.json recipe.yaml '
  'adapter_config.json adapter_model.safetensors trainer_state.json training_args.bin optimizer.pt scheduler.pt '
  'rng_state.pth rng_state_0.pth eval_results.json all_results.json modeling_own.py configuration_own.py .gitattributes '
  'model.gguf MODEL.GGUF tf_model.h5 flax_model.msgpack model.onnx picture.PNG modules.json two\\names new\nline '
  'results.jsonl params.JSON'
).split(' ')


def write(folder: pathlib.Path, names, content='{"a": 1}'):
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f'{content} {name}' if not name.endswith('.json') else content)


def test_all_small_files_except_those_of_weights_and_training(tmp_path):
  write(tmp_path, [*COPIED, *SKIPPED])
  write(tmp_path / 'folder', ['tokenizer.json', 'LICENSE'])
  (tmp_path / 'vocab.folder').mkdir()
  assert model_folder.small_files(tmp_path) == {name: tmp_path / name for name in COPIED}


def test_only_a_tokenizer_may_have_large_files(tmp_path, monkeypatch):
  monkeypatch.setattr(model_folder, '_LARGEST', 1000)
  write(tmp_path, ['tokenizer.json', 'vocab.txt', 'notes.txt', 'small.txt'])
  for name in ('tokenizer.json', 'vocab.txt', 'notes.txt'):
    (tmp_path / name).write_bytes(b'x' * 1001)
  assert model_folder.small_files(tmp_path).keys() == {'tokenizer.json', 'vocab.txt', 'small.txt'}


def test_links_are_copied_as_the_files_they_point_to(tmp_path):
  """A snapshot of the hub consists of links to blobs."""
  (tmp_path / 'blobs').mkdir()
  (tmp_path / 'blobs' / 'abc').write_text('the text')
  (tmp_path / 'blobs' / 'abc').chmod(0o444)
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'LICENSE').symlink_to('../blobs/abc')
  (tmp_path / 'out').mkdir()
  model_folder.copy(model_folder.small_files(tmp_path / 'in'), tmp_path / 'out')
  assert (tmp_path / 'out' / 'LICENSE').read_text() == 'the text' and not (tmp_path / 'out' / 'LICENSE').is_symlink()


@pytest.mark.parametrize('link', ['nowhere', 'LICENSE'], ids=['broken', 'loop'])
def test_a_file_that_cannot_be_read_is_reported_before_long_work(settings, model, no_text, link):
  (model / 'LICENSE').unlink()
  (model / 'LICENSE').symlink_to(link)
  (model / 'weights.bin').symlink_to('nowhere')  # not copied, so it does not matter
  refused(settings, model / 'LICENSE', 'cannot be read', 'remove it')


def test_a_file_without_permission_is_reported(tmp_path, monkeypatch):
  write(tmp_path, ['LICENSE', 'vocab.txt'])
  opened = pathlib.Path.open

  def deny(path, *args, **kwargs):
    if path.name == 'vocab.txt':
      raise PermissionError(13, 'Permission denied')
    return opened(path, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, 'open', deny)
  with pytest.raises(
    InputError, match=r'vocab.txt: the export copies this file, but it cannot be read \(Permission denied\)'
  ):
    model_folder.small_files(tmp_path)


# ---- --tokenizer ----


def other_tokenizer(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  write_tokenizer(folder)
  edit_json(folder / 'tokenizer_config.json', model_max_length=77)
  (folder / 'chat_template.jinja').write_text('another')
  (folder / 'LICENSE').write_text("The tokenizer's.\n")
  write(folder, ['config.json', 'generation_config.json', 'additional_chat_templates/other.jinja', 'model.safetensors'])
  return folder


def test_another_tokenizer_replaces_that_of_the_source(settings, model, tmp_path):
  write(model, ['vocab.json', 'special_tokens_map.json', 'additional_chat_templates/old.jinja'])
  settings |= dict(tokenizer=str(other_tokenizer(tmp_path / 'tokenizer')), recipe='none', compare=(), train_steps=0)
  pipeline.run(config_of(**settings))
  export = pathlib.Path(settings['workdir']) / 'export'
  files = {p.relative_to(export).as_posix() for p in export.rglob('*') if p.is_file()}
  of_tokenizer = {
    'tokenizer.json',
    'tokenizer_config.json',
    'chat_template.jinja',
    'additional_chat_templates/other.jinja',
  }
  assert (
    files
    == {
      'README.md',
      'SHA256SUMS',
      'config.json',
      'elder_jax.json',
      'model.safetensors',
      'generation_config.json',
      'LICENSE',
    }
    | of_tokenizer
  )
  for name in of_tokenizer:
    assert (export / name).read_bytes() == (tmp_path / 'tokenizer' / name).read_bytes(), name
  for name in ('LICENSE', 'generation_config.json'):
    assert (export / name).read_bytes() == (model / name).read_bytes(), name
  assert transformers.AutoTokenizer.from_pretrained(export).model_max_length == 77
  assert manifest.check(export) == len(files - {'SHA256SUMS', 'README.md'})


def test_a_folder_without_a_tokenizer_is_refused(settings, no_text, tmp_path):
  write(tmp_path / 'empty', ['LICENSE'])
  refused(settings, f'--tokenizer={tmp_path}/empty', 'holds no tokenizer', tokenizer=str(tmp_path / 'empty'))
  refused(settings, '--tokenizer=', 'is a file', tokenizer=str(tmp_path / 'empty' / 'LICENSE'))


# ---- code that comes with a checkpoint ----


def exported(settings, model) -> pathlib.Path:
  settings |= dict(model=str(model), num_remove=None, remove_layers='2,3', recipe='none', compare=())
  settings |= dict(train_data='', eval_data=())
  pipeline.run(config_of(**settings))
  return pathlib.Path(settings['workdir']) / 'export'


@pytest.mark.parametrize('code', [True, False], ids=['with its code', 'without'])
def test_no_code_is_needed_to_load_an_export(settings, tmp_path, code):
  """transformers supports all families, so code that came with an early checkpoint is not needed."""
  folder = write_tiny_llama(tmp_path / 'in')
  auto_map = {'AutoConfig': 'configuration_own.OwnConfig', 'AutoModelForCausalLM': 'modeling_own.OwnForCausalLM'}
  edit_json(folder / 'config.json', auto_map=auto_map)
  edit_json(folder / 'tokenizer_config.json', auto_map={'AutoTokenizer': [None, 'tokenization_own.OwnTokenizer']})
  if code:
    (folder / 'configuration_own.py').write_text('from transformers import LlamaConfig as OwnConfig\n')
    (folder / 'modeling_own.py').write_text('from transformers import LlamaForCausalLM as OwnForCausalLM\n')
    (folder / 'tokenization_own.py').write_text('from transformers import PreTrainedTokenizerFast as OwnTokenizer\n')
  export = exported(settings, folder)
  assert 'auto_map' not in json.loads((export / 'config.json').read_text())
  kept = json.loads((export / 'tokenizer_config.json').read_text())
  assert ('auto_map' in kept) == (export / 'tokenization_own.py').exists() == code
  assert kept | {'auto_map': 0} == json.loads((folder / 'tokenizer_config.json').read_text()) | {'auto_map': 0}
  for trust in (True, False):
    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=trust)
    assert type(model) is transformers.LlamaForCausalLM and len(model.model.layers) == 4
    assert transformers.AutoTokenizer.from_pretrained(export, trust_remote_code=trust)('a').input_ids


def test_auto_map_to_another_repository_is_kept(tmp_path):
  write(tmp_path / 'in', ['LICENSE'])
  text = json.dumps({'auto_map': {'AutoTokenizer': ['own/code--tokenization_own.OwnTokenizer', None]}})
  (tmp_path / 'in' / 'tokenizer_config.json').write_text(text)
  (tmp_path / 'out').mkdir()
  model_folder.copy(model_folder.small_files(tmp_path / 'in'), tmp_path / 'out')
  assert (tmp_path / 'out' / 'tokenizer_config.json').read_text() == text


def test_the_manifest_covers_folders(tmp_path):
  write(tmp_path, ['README.md', 'LICENSE', 'additional_chat_templates/a.jinja'])
  manifest.write(tmp_path, {})
  assert manifest.check(tmp_path) == 2
  (tmp_path / 'additional_chat_templates' / 'a.jinja').write_text('changed')
  with pytest.raises(InputError, match=r'a.jinja: is not what was written'):
    manifest.check(tmp_path)
  good = shutil.copy(tmp_path / 'SHA256SUMS', tmp_path / 'before')
  for name in ('../x', '/etc/passwd', 'a//b', 'a/./b'):
    text = good.read_text().replace('additional_chat_templates/a.jinja', name)
    (tmp_path / 'SHA256SUMS').write_text(text)
    with pytest.raises(InputError, match='is no hash and file name'):
      manifest.check(tmp_path)
