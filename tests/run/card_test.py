"""README.md of an export: its metadata, its warnings, its commands, and that it may be edited."""

import json
import pathlib
import re
import subprocess

import gguf
from gguf_files import write_gguf
from huggingface_hub import ModelCard
import pytest
from refusal import edit_json
from report_test import make
from report_test import row
import strangers
from tiny import config_of
from tiny import write_tiny_llama
import yaml

from elder_jax.commands import run_verb
from elder_jax.hf import manifest
from elder_jax.run import card
from elder_jax.run import lineage
from elder_jax.run import origin
from elder_jax.run import series
from elder_jax.run import usage
from elder_jax.run.caveats import FEW_TOKENS
from elder_jax.run.caveats import caveats

CONFIG = {'remove_layers': None, 'lr': 1e-3}
README = """---
license: other
license_name: own-terms
license_link: LICENSE
language: [en, no]
tags: [a, b]
---
# The source
"""


def text_of(report: dict, files: usage.Files = usage.NOTHING) -> str:
  more = {'method': 'elder', 'steps': 2, 'tokens_per_step': 128}
  return card.model_card(more | report | {'versions': {'elder_jax': '1'}}, CONFIG, files)


def metadata(text: str) -> dict:
  """Of the front matter, by YAML and by the hub's own library alike."""
  found = yaml.safe_load(text.split('---\n')[1])
  assert ModelCard(text).data.to_dict() == found
  return found


def cut(model: pathlib.Path, work: pathlib.Path, **more) -> pathlib.Path:
  settings = dict(model=str(model), workdir=str(work), remove_layers='1,4', recipe='none', compare=(), verify='jax')
  series.run(config_of(**settings | more))
  return work / 'export'


@pytest.fixture
def export(model, tmp_path) -> pathlib.Path:
  """Two layers less, of a source that has a card of its own."""
  (model / 'README.md').write_text(README)
  return cut(model, tmp_path / 'work')


# ---- metadata ----


def test_the_metadata_of_a_folder(export):
  found = metadata((export / 'README.md').read_text())
  assert found == {
    'language': ['en', 'no'],
    'library_name': 'transformers',
    'license': 'other',
    'license_name': 'own-terms',
    'license_link': 'LICENSE',
    'pipeline_tag': 'text-generation',
    'tags': ['elder_jax', 'pruned', 'depth-pruning'],
  }
  assert (export / 'LICENSE').is_file()  # the link leads somewhere
  assert ModelCard.load(export / 'README.md').data.license == 'other'
  assert 'names no licence' not in (export / 'README.md').read_text()


def test_a_model_of_the_hub_is_the_base_model():
  text = text_of(make(origin={'base_model': 'some/model'}))
  assert metadata(text)['base_model'] == 'some/model' and metadata(text)['base_model_relation'] == 'finetune'
  assert '[some/model](https://huggingface.co/some/model) without 2 of its 6 layers' in text
  assert '# model, 4 of 6 layers' in text and 'names no licence' in text
  assert not {'base_model', 'base_model_relation'} & metadata(text_of(make(model='/data/mine'))).keys()


@pytest.mark.parametrize(
  'readme, told',
  [
    ('---\nlicense: mit\nlanguage: no\n---\n', {'license': 'mit', 'language': ['no']}),
    ('---\nlicense: [mit]\nlanguage: {a: 1}\nbase_model: own/base\n---\n', {}),
    ('---\n- a list\n---\n', {}),
    ('---\nlicense: [\n---\n', {}),
    ('No metadata.', {}),
    (b'---\nlicense: \xff\xfe\n---\n', {}),
    (None, {}),
  ],
  ids=str,
)
def test_the_card_of_the_source(tmp_path, readme, told):
  if readme is not None:
    (tmp_path / 'README.md').write_bytes(readme if isinstance(readme, bytes) else readme.encode())
  assert origin.read(str(tmp_path), tmp_path) == told


def test_metadata_that_cannot_be_read_is_reported(tmp_path, capsys):
  (tmp_path / 'README.md').write_text('---\nlicense: [\n---\n')
  origin.read(str(tmp_path), tmp_path)
  assert 'README.md: the metadata cannot be read' in capsys.readouterr().err


def test_the_original_is_known_through_the_lineage(tmp_path):
  steps = [
    {'model': 'own/base', 'layers': 8, 'removed': [2, 3], 'recipe': 'none', 'tokens': 0},
    {'model': 'export', 'layers': 6, 'removed': [2, 3], 'recipe': 'absorb_then_train', 'tokens': 2_000_000},
  ]
  (tmp_path / lineage.NAME).write_text(json.dumps({'lineage': steps}))
  assert origin.read(str(tmp_path), tmp_path) == {'base_model': 'own/base'}
  text = text_of(make(model=str(tmp_path), lineage=steps, origin={'base_model': 'own/base'}))
  assert '# base, 4 of 8 layers' in text and 'numbers of the original): 2-5. Kept: 0-1, 6-7.' in text
  assert '1. own/base: 2 of 8 layers removed (2-3), recipe none.' in text
  assert '2. export: 2 of 6 layers removed (2-3), recipe absorb_then_train, trained on 2,000,000 tokens.' in text
  # A local original: the card of the export may name it.
  steps[0]['model'] = 'base'
  (tmp_path / lineage.NAME).write_text(json.dumps({'lineage': steps}))
  assert origin.read(str(tmp_path), tmp_path) == {}
  (tmp_path / 'README.md').write_text('---\nbase_model: own/base\n---\n')
  assert origin.read(str(tmp_path), tmp_path) == {'base_model': 'own/base'}


@pytest.mark.parametrize('steps', ['{', '{"lineage": 3}', '{"lineage": [3]}', '{"lineage": [{"removed": ["a"]}]}'])
def test_a_lineage_that_cannot_be_read_is_reported(tmp_path, steps, capsys):
  (tmp_path / lineage.NAME).write_text(steps)
  assert lineage.of_folder(tmp_path) == [] and 'the history of the model is lost' in capsys.readouterr().err


def test_public_names(tmp_path):
  cached = tmp_path / 'models--own--some--model' / 'snapshots' / ('a' * 40)
  cached.mkdir(parents=True)
  assert lineage.public_name(str(cached)) == 'own/some--model'
  assert lineage.public_name('own/model') == 'own/model' and lineage.public_name(str(tmp_path)) == tmp_path.name
  assert lineage.ranges([5, 3, 4, 9, 0]) == '0, 3-5, 9' and lineage.ranges([]) == ''


# ---- what it says ----


def test_the_same_run_gives_the_same_card(model, tmp_path):
  (model / 'README.md').write_text(README)
  a, b = (cut(model, tmp_path / name) / 'README.md' for name in 'ab')
  assert a.read_bytes() == b.read_bytes() and str(tmp_path) not in a.read_text()


def test_the_sizes(export):
  text = (export / 'README.md').read_text()
  size = sum(path.stat().st_size for path in export.glob('*.safetensors'))
  told = float(re.search(r'Weights on disk: ([\d.]+) MB F32\.', text)[1])
  assert told == pytest.approx(size / 1e6, abs=0.06) and '| layers | 6 | 4 |' in text


def test_caveats():
  few = {'steps': 16, 'tokens_per_step': 1024}
  [smoke, uneven] = caveats(make(train_data=[{}], **few))
  assert '16,384 tokens' in smoke and 'smoke test' in smoke
  assert '1428.57 × on news, 2.02 × on wiki. Expect' in uneven
  [alone] = caveats(make(steps=FEW_TOKENS, tokens_per_step=1))  # nothing is known of the training text
  assert 'Expect' not in alone
  even = {'wiki': {'dense': 10.0, 'pruned': 12.0}, 'news': {'dense': 20.0, 'pruned': 25.0}}
  assert caveats(make(ppl=even, train_data=[{}], steps=FEW_TOKENS, tokens_per_step=1)) == []
  assert caveats(make(ppl=even, steps=0, tokens_per_step=0)) == ['It was not trained after layers were removed.']
  held_out = dict(ppl=even, train_data=[{}], steps=FEW_TOKENS, tokens_per_step=1, held_out_loss=2.0)
  rows = [row('regularize', 12.0, 25.0) | {'held_out_loss': 2.05}]
  assert '1.05 × on text held out' in caveats(make(rows=rows, **held_out))[0]
  # A run that heals is compared with the teacher, not with the model before.
  healed = dict(heals=True, steps=FEW_TOKENS, tokens_per_step=1, ppl=even)
  assert caveats(make(**healed)) == []
  assert '6.00 × on wiki' in caveats(make(teacher={'ppl': {'wiki': 2.0, 'news': 25.0}}, **healed))[0]
  # All training counts.
  steps = [{'removed': [1], 'tokens': FEW_TOKENS // 2}] * 2
  assert caveats(make(ppl=even, lineage=steps, steps=1, tokens_per_step=1)) == []


def test_caveats_stand_at_the_top():
  text = text_of(make())
  assert text.index('> [!WARNING]\n> It was trained on 256 tokens only') < text.index('## What was done')


# ---- commands ----


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('chat', [True, False], ids=['chat', 'text'])
def test_the_python_of_the_card_runs(model, tmp_path, capsys, chat):
  if not chat:
    (model / 'chat_template.jinja').unlink()
  export = cut(model, tmp_path / 'work')
  text = (export / 'README.md').read_text()
  assert ('apply_chat_template' in text) == ('llama-cli -m model.gguf' in text) == chat
  [code] = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  exec(code.replace('FOLDER', str(export)), {})
  assert capsys.readouterr().out.strip()
  for command in ('vllm serve FOLDER', 'convert_hf_to_gguf.py FOLDER', 'llama-server -m model.gguf', 'ollama create'):
    assert command in text


def kinds(kind: str, *of_layers, **more) -> usage.Files:
  return usage.NOTHING._replace(config={'model_type': kind, 'layer_types': list(of_layers), **more})


def test_gguf_commands_only_where_the_file_is_the_same_model():
  near, far, linear = 'sliding_attention', 'full_attention', 'linear_attention'

  def commands(files: usage.Files) -> bool:
    return 'ollama run' in '\n'.join(usage.section(files))

  assert commands(kinds('llama', far, far)) and commands(kinds('llama')) and commands(usage.NOTHING)
  assert commands(kinds('gemma2', near, far, near)) and not commands(kinds('gemma2', far, near, far))
  # export-gguf writes what the converter does not.
  for of_layers, converted in (([*[near] * 5, far], True), ([near] * 6, False)):
    text = '\n'.join(usage.section(kinds('gemma3_text', *of_layers)))
    assert ('python convert_hf_to_gguf.py FOLDER' in text) == converted and 'elder_jax export-gguf FOLDER' in text
    assert ('The file would be another model' in text) != converted
  assert 'export-gguf' not in '\n'.join(usage.section(kinds('gemma2', near, far)))
  for of_layers, served in (([near, far], True), ([far, near], False)):
    assert ('vllm serve' in '\n'.join(usage.section(kinds('gpt_oss', *of_layers)))) == served
  hybrid = [*[linear] * 3, far, linear]
  assert commands(kinds('qwen3_5_text', *hybrid)) and not commands(kinds('qwen3_5_text', *hybrid[1:]))
  assert commands(kinds('olmo3', far, near)) and not commands(kinds('opt')) and not commands(kinds('new', far, near))
  assert commands(kinds('smollm3', far, far, no_rope_layers=[1, 1]))
  assert not commands(kinds('smollm3', far, far, no_rope_layers=[1, 0]))


def test_code_that_is_not_included_is_named():
  text = '\n'.join(usage.section(kinds('new', auto_map={'AutoConfig': 'a.B'})))
  assert 'add the Python files of the original' in text and text.count('trust_remote_code=True') == 2
  assert 'vllm serve FOLDER --trust-remote-code' in text


def test_a_model_for_pictures():
  text = text_of(make(), usage.NOTHING._replace(config={'text_config': {}, 'vision_config': {}}))
  assert metadata(text)['pipeline_tag'] == 'image-text-to-text' and 'AutoModelForImageTextToText' in text


# ---- editing it ----


def verified(capsys, folder: pathlib.Path) -> str:
  run_verb('verify', [str(folder)])
  assert subprocess.run(['sha256sum', '-c', '--quiet', 'SHA256SUMS'], cwd=folder, check=False).returncode == 0
  return capsys.readouterr().out


def test_an_edited_card_passes(export, capsys):
  assert 'files as written, llama, 4 layers' in verified(capsys, export)
  (export / 'README.md').write_text('---\nlicense: mit\n---\nMine.\n')
  assert verified(capsys, export).count('\n') == 1
  (export / 'README.md').unlink()
  assert verified(capsys, export).count('\n') == 1


def test_a_card_that_an_earlier_version_listed(export, capsys):
  sums = export / 'SHA256SUMS'
  sums.write_text(f'{manifest._sha256(export / "README.md")}  README.md\n{sums.read_text()}')
  files = manifest.check(export)
  assert verified(capsys, export).count('\n') == 1
  (export / 'README.md').write_text('Mine.\n')
  run_verb('verify', [str(export)])
  note, told = capsys.readouterr().out.splitlines()
  assert 'README.md: was edited or removed since the export' in note and f'{files - 1} files as written' in told


@pytest.mark.filterwarnings('ignore')
def test_an_export_of_a_model_that_the_decoder_does_not_know(tmp_path, capsys):
  source = strangers.save(strangers.mixtral, tmp_path / 'source')
  edit_json(source / 'config.json', model_type='of_a_stranger')
  export = strangers.cut(source, tmp_path / 'work', [0, 2], verify='auto')
  assert 'files as written, of_a_stranger, 3 layers' in verified(capsys, export)


def test_a_gguf_export(tmp_path, capsys):
  folder = write_tiny_llama(tmp_path / 'model', vocab_size=265, hidden_size=64, intermediate_size=256)
  path = write_gguf(tmp_path / 'model.gguf', folder, quantize=gguf.GGMLQuantizationType.Q4_1)
  made = cut(path, tmp_path / 'work', export_format='gguf')
  text = (made / 'README.md').read_text()
  assert metadata(text)['library_name'] == 'gguf' and 'gguf' in metadata(text)['tags']
  assert '### transformers' not in text and "echo 'FROM ./model-4-layers.gguf' > Modelfile" in text
  assert re.search(r'Weights on disk: [\d.]+ MB F32, [\d.]+ MB Q4_1\.', text)
  (made / 'README.md').write_text('Mine.\n')
  assert 'files as written, llama, 4 layers' in verified(capsys, made)


def test_the_fields_of_a_gguf_file(tmp_path, monkeypatch):
  fields = {
    'general.license': 'gemma',
    'general.languages': ['en', 'de'],
    'general.source.url': 'https://example.com/a/b',
    'general.base_model.0.repo_url': 'https://huggingface.co/own/base',
  }
  monkeypatch.setattr('elder_jax.hf.gguf.source.read_raw', lambda path: (fields, {}, []))
  assert origin.read(str(tmp_path / 'x.gguf'), tmp_path) == {
    'license': 'gemma', 'language': ['en', 'de'], 'base_model': 'own/base',
  }  # fmt: skip
