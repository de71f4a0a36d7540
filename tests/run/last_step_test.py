"""No run fails at its last step, whatever the state of the files that an export copies or a run writes."""

import json
import pathlib

import pytest
from tiny import config_of

from elder_jax.errors import InputError
from elder_jax.hf import manifest
from elder_jax.hf.source import open_source
from elder_jax.run import job as job_module
from elder_jax.run import pipeline

SMALL = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja', 'LICENSE')
WRITTEN = ('config.json', 'model.safetensors', 'README.md', 'SHA256SUMS', *SMALL)  # by an export
LOADED = 'the model was loaded'


def missing(path: pathlib.Path):
  path.unlink()


def folder(path: pathlib.Path):
  path.unlink()
  path.mkdir()


def link_to_nothing(path: pathlib.Path):
  path.unlink()
  path.symlink_to('nowhere')


def not_utf8(path: pathlib.Path):
  path.write_bytes(b'\xff\xfe\x80' * 10)


def empty(path: pathlib.Path):
  path.write_bytes(b'')


def json_of_another_kind(path: pathlib.Path):
  path.write_text('["N/A", NaN]')


@pytest.mark.parametrize('state', [missing, folder, link_to_nothing, not_utf8, empty, json_of_another_kind])
@pytest.mark.parametrize('name', SMALL)
def test_a_small_file_of_the_source(settings, model, monkeypatch, name, state):
  """A run is either refused in one sentence before the model is loaded, or its export is complete."""
  state(model / name)
  load, loaded = job_module.load_model, []
  monkeypatch.setattr(job_module, 'load_model', lambda *args: loaded.append(1) or load(*args))
  settings |= dict(recipe='none', compare=(), method='last', verify='torch')
  try:
    pipeline.run(config_of(**settings))
  except InputError as e:
    assert not loaded, f'refused only after {LOADED}: {e}'
    assert name in str(e) or 'tokenizer' in str(e), e
    return
  export = pathlib.Path(settings['workdir']) / 'export'
  assert manifest.check(export) and open_source(str(export), export).num_layers == 4
  if state is not missing and state is not folder:
    assert (export / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize('name', WRITTEN)
def test_folders_from_an_earlier_attempt(settings, name):
  """export.partial and export of a killed run may contain anything under the names that are written."""
  work = pathlib.Path(settings['workdir'])
  settings |= dict(recipe='none', compare=(), method='last')
  pipeline.prepare(config_of(**settings))
  for there in ('export', 'export.partial'):
    (work / there / name).mkdir(parents=True)
  pipeline.run(config_of(**settings))
  assert manifest.check(work / 'export') and (work / 'export' / name).is_file()
  assert not (work / 'export.partial').exists()


@pytest.mark.parametrize(
  'content', [b'', b'\xff\xfe', b'{"stage"', b'NaN\n[]\n3\n"x"\n', b'{"stage": "none"}\n{"step": 1}\n'], ids=str
)
def test_a_damaged_line_of_metrics_is_harmless(settings, content):
  work = pathlib.Path(settings['workdir'])
  settings |= dict(recipe='prune_then_train', compare=(), method='last')
  pipeline.prepare(config_of(**settings))
  (work / 'metrics.jsonl').write_bytes(content)
  report = pipeline.run(config_of(**settings))
  assert report['verify']['jax'] <= 1e-4
  lines = [json.loads(line) for line in (work / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if line.get('stage') == 'prune_then_train' and 'loss' in line] == [0, 1, 2]
