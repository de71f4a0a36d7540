"""The Python API: README's example, agreement with a run, and errors with their setting, value and why."""

import dataclasses
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tiny as tiny_lib

import elder_jax as ej
from elder_jax.training import trainer

README = pathlib.Path(__file__).parents[1] / 'README.md'


@pytest.fixture(scope='module')
def deep(tmp_path_factory) -> str:
  return str(tiny_lib.write_tiny_llama(tmp_path_factory.mktemp('deep'), num_hidden_layers=8))


@pytest.fixture
def dense(deep) -> ej.Model:
  return ej.load(deep)


@pytest.fixture
def batches(dense, text) -> ej.Batches:
  return ej.batches(dense, str(text), seq_len=32, num_sequences=16)


def test_the_example_of_the_readme_runs(deep, text, tmp_path, monkeypatch, capsys):
  """Unchanged except for a tiny model, short sequences and fewer layers."""
  code = re.search(r'^    import elder_jax as ej\n(?:    .*\n|\n)+', README.read_text(), re.MULTILINE)[0]
  code = re.sub(r'^    ', '', code, flags=re.MULTILINE)
  for old, new in (
    ("'HuggingFaceTB/SmolLM2-135M'", repr(deep)),
    ('seq_len=512, num_sequences=128', 'seq_len=32, num_sequences=16'),
    ('choose(dense, 7', 'choose(dense, 2'),
    ('steps=100', 'steps=3'),
    ("'test.txt'", "'test.txt', seq_len=32"),
  ):
    assert old in code, code
    code = code.replace(old, new)
  for name in ('wiki.txt', 'test.txt'):
    (tmp_path / name).write_text(text.read_text())
  monkeypatch.chdir(tmp_path)
  exec(compile(code, 'README.md', 'exec'), {})
  assert float(capsys.readouterr().out) > 1
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['num_hidden_layers'] == 6 and (tmp_path / 'out' / 'SHA256SUMS').is_file()


def test_functions_do_not_change_their_arguments(dense, batches):
  before = [np.asarray(a) for a in jax.tree.leaves(dense.decoder)]
  for small in (ej.remove(dense, [1, 4]), ej.absorb(dense, [1, 4], batches)):
    assert (small.num_layers, small.kept) == (6, (0, 2, 3, 5, 6, 7))
    trained = ej.train(small, batches, ej.TrainSettings(steps=2, lr=1e-3), teacher=dense)
    assert trained.kept == small.kept and trained.num_params == small.num_params
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(trained.decoder), jax.tree.leaves(small.decoder)))
  assert ej.remove(small, [0]).kept == (2, 3, 5, 6, 7)
  for a, b in zip(before, jax.tree.leaves(dense.decoder)):
    np.testing.assert_array_equal(a, b)


def test_hidden_distillation_compares_each_layer_with_its_own_of_the_teacher(dense, batches):
  seen, train = [], trainer.train
  settings = ej.TrainSettings(steps=1, lr=1e-3, distill_hidden=0.5)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, 'train', lambda *a, **more: seen.append((a[2], more['kept'])) or train(*a, **more))
    ej.train(ej.remove(dense, [1, 4]), batches, settings, teacher=dense)
  assert [(s.distils, kept) for s, kept in seen] == [(False, [0, 2, 3, 5, 6, 7])]
  with pytest.raises(ej.InputError, match='distill_hidden=0.5: needs a teacher that was loaded from'):
    ej.train(ej.remove(dense, [1]), batches, settings, teacher=ej.remove(dense, [2]))


def test_the_api_and_a_run_choose_and_measure_the_same(deep, text, dense, tmp_path):
  config = ej.Config.of(
    model=deep,
    workdir=str(tmp_path / 'work'),
    num_remove=2,
    recipe='absorb',
    compare=(),
    train_data=str(text),
    eval_data={'text': str(text)},
    seq_len=32,
    num_sequences=16,
    eval_seq_len=32,
    eval_tokens=256,
    verify='jax',
  )
  report = ej.run(config)
  batches = ej.batches(dense, str(text), seq_len=32, num_sequences=16)
  choice = ej.choose(dense, 2, batches)
  assert sorted(choice.removed) == report['removed']
  small = ej.absorb(dense, choice.removed, batches)
  ppl = ej.perplexity(small, str(text), seq_len=32, tokens=256)
  np.testing.assert_allclose(ppl, report['ppl']['text']['pruned'], rtol=1e-6)
  assert ej.generate(small, 'one', 4) == ej.generate(small, 'one', 4)


@pytest.mark.parametrize('method', [m for m in ej.METHODS if m != 'elder'])
def test_every_method_works(dense, batches, method):
  choice = ej.choose(dense, 1, batches, method, score_steps=1)
  assert len(choice.removed) == 1 and choice.removed[0] in range(8)


@pytest.mark.parametrize(
  'call, setting, value',
  [
    (lambda m, b: ej.load('/nowhere'), 'model', '/nowhere'),
    (lambda m, b: ej.load(str(m.source.files), dtype='int8'), 'dtype', 'int8'),
    (lambda m, b: ej.choose(m, 8, b), 'n', 8),
    (lambda m, b: ej.choose(m, 3, b, 'taylor'), 'method', 'taylor'),
    (lambda m, b: ej.choose(m, 3, b, 'best'), 'method', 'best'),
    (lambda m, b: ej.remove(m, [8]), 'layers', [8]),
    (lambda m, b: ej.remove(m, range(8)), 'layers', list(range(8))),
    (lambda m, b: ej.absorb(m, [1, 1], b), 'layers', [1, 1]),
    (lambda m, b: ej.train(m, b, ej.TrainSettings(distill=0.5)), 'distill', (0.5,)),
    (lambda m, b: ej.train(m, b, ej.TrainSettings(distill_hidden=0.5)), 'distill_hidden', 0.5),
    (lambda m, b: ej.train(m, b, teacher=m), 'teacher', str),
    (lambda m, b: ej.TrainSettings(lr=-1), 'lr', -1),
    (lambda m, b: ej.TrainSettings(optimizer='sgd'), 'optimizer', 'sgd'),
    (lambda m, b: ej.Config.of(seq_length=3), 'seq_length', 3),
    (lambda m, b: ej.batches(m, '/no/text.txt'), 'text', '/no/text.txt'),
    (lambda m, b: ej.export(m, '/'), 'folder', '/'),
  ],
)
def test_errors_have_a_setting_a_value_and_a_reason(dense, batches, call, setting, value):
  with pytest.raises(ej.InputError) as caught:
    call(dense, batches)
  error = caught.value
  assert error.setting == setting and (value is str or error.value == value)
  assert error.why.endswith('.') and str(error).startswith(f'{setting}=')
  assert error.for_command() == f'--{error}'


def test_an_existing_folder_is_not_overwritten(dense, tmp_path):
  figures = ej.export(ej.remove(dense, [3]), str(tmp_path / 'out'))
  assert figures['jax'] < 1e-4
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ej.InputError, match='already exists'):
    ej.export(dense, str(tmp_path / 'out'))
  assert sorted(tmp_path.iterdir()) == before
  again = ej.load(str(tmp_path / 'out'))
  assert again.num_layers == 7 and dataclasses.replace(again).kept == tuple(range(7))


def test_public_names():
  assert set(ej.__all__) <= set(dir(ej))
  for name in ej.__all__:
    assert getattr(ej, name) is not None
  with pytest.raises(AttributeError, match='no_such_name'):
    getattr(ej, 'no_such_name')  # noqa: B009
