"""Published files that differ from what transformers 5 writes: buffers, prefixes, heads, values out of range."""

import json
import pathlib
import shutil

from families_test import torch_logits
from families_test import write_model
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import edit_json
from refusal import one_sentence
import safetensors.numpy
from tiny import config_of
from tiny import slow

from elder_jax.errors import InputError
from elder_jax.hf import families
from elder_jax.hf.load import load_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import _head_and_embedding
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline
from elder_jax.run import work as work_module

TOKENS_BT = np.arange(5, 21, dtype=np.int32)[None]
HEADS = ('lm_head.weight', 'lm_head.bias', 'embed_out.weight')


QUICK = ('llama', 'gpt_neox', 'opt', 'gemma3_text')


@pytest.fixture(scope='module', params=[f if f in QUICK else slow(f) for f in families.FAMILIES])
def written(request, tmp_path_factory) -> pathlib.Path:
  """A model of each family, saved by transformers 5; read only."""
  return write_model(tmp_path_factory.mktemp('model'), request.param)


@pytest.fixture
def own(written, tmp_path) -> pathlib.Path:
  shutil.copytree(written, tmp_path / 'own')
  return tmp_path / 'own'


def edit(folder: pathlib.Path, change):
  path = folder / 'model.safetensors'
  safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path, metadata={'format': 'pt'})


def opened(folder: pathlib.Path) -> Source:
  return open_source(str(folder), folder / 'scratch')


def logits(folder: pathlib.Path) -> np.ndarray:
  model = load_model(opened(folder), 'float32')
  return np.asarray(logits_of(model, forward(model, TOKENS_BT)[0]))


@pytest.mark.parametrize('dtype', ['uint8', 'bool', 'float32', 'float64', 'int64'])
def test_buffers_of_any_type_are_ignored(own, dtype):
  edit(own, lambda tensors: {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()})
  before = opened(own)
  buffers = [name for name, entry in before.family.WEIGHTS.items() if entry is None]
  assert buffers or before.config['model_type'] in ('opt',)
  buffer = np.ones((1, 1, 4, 4), dtype)
  edit(own, lambda tensors: tensors | {name.format(l=l): buffer for name in buffers for l in range(before.num_layers)})
  after = opened(own)
  assert after.dtype == 'bfloat16' and after.shapes == before.shapes


def test_names_without_the_prefix_are_read_as_in_transformers(own):
  before, theirs = logits(own), torch_logits(own, TOKENS_BT)
  prefix = next(iter(opened(own).family.WEIGHTS)).partition('.')[0] + '.'
  edit(own, lambda tensors: {n if n in HEADS else n.removeprefix(prefix): t for n, t in tensors.items()})
  np.testing.assert_array_equal(logits(own), before)
  np.testing.assert_array_equal(torch_logits(own, TOKENS_BT), theirs)

  def half(tensors):
    return {(prefix + n if i % 2 and n not in HEADS else n): t for i, (n, t) in enumerate(tensors.items())}

  edit(own, half)  # some names with the prefix, some without
  np.testing.assert_array_equal(logits(own), before)

  def twice(name):
    return name if name in HEADS else f'{prefix}{prefix}{name.removeprefix(prefix)}'

  edit(own, lambda tensors: {twice(name): tensor for name, tensor in tensors.items()})
  np.testing.assert_array_equal(logits(own), before)


def test_a_tied_model_may_store_only_its_head(own):
  source = opened(own)
  head, embed = _head_and_embedding(source)
  edit(own, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != head})
  edit_json(own / 'config.json', tie_word_embeddings=True)
  before = logits(own)
  edit(own, lambda tensors: {head if name == embed else name: tensor for name, tensor in tensors.items()})
  np.testing.assert_array_equal(logits(own), before)


def test_a_tied_model_keeps_a_head_that_differs(own, settings, capsys):
  """As in transformers 5. A head that equals the embedding is dropped."""
  source = opened(own)
  head, embed = (next(n for n, e in source.family.WEIGHTS.items() if e and e[0] == ours) for ours in ('head', 'embed'))
  edit(own, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != head})
  edit_json(own / 'config.json', tie_word_embeddings=True)
  tied = logits(own)
  edit(own, lambda tensors: tensors | {head: tensors[embed]})
  assert opened(own).spec.tied and head not in opened(own).shapes and not capsys.readouterr().err

  def round_off(tensor):
    return tensor.astype(jnp.bfloat16).astype(np.float32)

  edit(own, lambda tensors: tensors | {embed: round_off(tensors[embed]), head: tensors[embed].astype(jnp.bfloat16)})
  assert opened(own).spec.tied and not capsys.readouterr().err  # the same values in another type
  tied = logits(own)
  edit(own, lambda tensors: tensors | {head: tensors[embed]})
  np.testing.assert_array_equal(logits(own), tied)
  noise = np.random.default_rng(0).normal(size=source.shapes[embed]).astype(np.float32)
  edit(own, lambda tensors: tensors | {head: tensors[embed] + 0.1 * noise})
  assert np.abs(logits(own) - tied).max() > 0.1
  np.testing.assert_allclose(logits(own), torch_logits(own, TOKENS_BT), atol=2e-5)
  assert f'{head} differs from {embed}; the head is kept' in capsys.readouterr().err
  what = dict(num_remove=0, recipe='none', compare=(), train_data='', eval_data=(), verify='torch')
  pipeline.run(config_of(**settings | what | dict(model=str(own))))
  export = pathlib.Path(settings['workdir']) / 'export'
  assert json.loads((export / 'config.json').read_text())['tie_word_embeddings'] is False
  np.testing.assert_array_equal(torch_logits(export, TOKENS_BT), torch_logits(own, TOKENS_BT))


@pytest.mark.parametrize('copies', [True, False])
def test_a_value_that_does_not_fit_the_exported_type_is_not_exported(settings, model, text, copies):
  def enlarge(tensors):
    tensors['model.norm.weight'][3] = 7e4
    return tensors

  edit(model, enlarge)
  settings |= dict(num_remove=2, recipe='none', compare=(), method='last', export_dtype='float16')
  if copies:
    settings |= dict(num_remove=None, remove_layers='2', train_data='', eval_data=())
  with pytest.raises(InputError) as caught:
    pipeline.run(config_of(**settings))
  one_sentence(caught.value.for_command(), 'model.norm.weight', '7e+04', 'float16', '--export_dtype=bfloat16')
  assert not (pathlib.Path(settings['workdir']) / 'export').exists()
  assert pipeline.run(config_of(**settings | dict(export_dtype='bfloat16')))['kept']  # in the same folder


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_not_exported(settings, monkeypatch, value):
  make = work_module.apply_recipe

  def poisoned(*args, **how):
    pruned = make(*args, **how)
    w = pruned.layers.w_down
    w.set_value(w.get_value().at[1, 2, 3].set(value))
    return pruned

  monkeypatch.setattr(work_module, 'apply_recipe', poisoned)
  settings |= dict(recipe='none', compare=(), method='last', eval_data=())
  settings |= dict(train_steps=0)
  with pytest.raises(InputError) as caught:
    pipeline.run(config_of(**settings | dict(method='cosine_block')))
  one_sentence(
    caught.value.for_command(), 'model.layers.1.mlp.down_proj.weight', 'NaN or infinite', 'nothing is exported'
  )


def test_a_git_lfs_pointer_is_named(model):
  (model / 'model.safetensors').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n')
  with pytest.raises(InputError, match='is a Git LFS pointer; run git lfs pull'):
    opened(model)
