"""config.json of published checkpoints is read or refused as documented; so is every config that transformers writes."""

import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import one_sentence
import torch
import transformers
from transformers.activations import ACT2FN

from elder_jax.errors import InputError
from elder_jax.hf import families
from elder_jax.hf.cut import pruned_config
from elder_jax.hf.families.fields import ACTIVATIONS
from elder_jax.hf.families.fields import NEUTRAL
from elder_jax.hf.families.fields import OFF
from elder_jax.model import layers
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward

PUBLISHED = json.loads((pathlib.Path(__file__).parents[1] / 'data' / 'published_configs.json').read_text())
del PUBLISHED['_about']
READ = [name for name, entry in PUBLISHED.items() if entry['expect'] == 'read']
DOCS = pathlib.Path(__file__).parents[2] / 'docs'
SUPPORTED, REFUSED = ((DOCS / f'{name}.md').read_text() for name in ('models', 'adding_a_family'))
ACTIVATION_KEYS = ('hidden_act', 'hidden_activation', 'activation_function')


def read(config: dict):
  return families.FAMILIES[config['model_type']].spec_from_config(config)


def of_family(kind: str) -> dict:
  """config.json of a published checkpoint of a family."""
  return next(PUBLISHED[name]['config'] for name in READ if PUBLISHED[name]['config']['model_type'] == kind)


def test_every_family_has_a_published_checkpoint():
  assert {PUBLISHED[name]['config']['model_type'] for name in READ} == set(families.FAMILIES)
  assert len(PUBLISHED) >= 32 and len(READ) >= 27


@pytest.mark.parametrize('name', READ)
def test_a_published_config_is_read(name):
  entry = PUBLISHED[name]
  spec, num_layers = read(entry['config'])
  assert num_layers == entry['layers']
  assert {key: getattr(spec, key) for key in entry['sizes']} == entry['sizes'] and len(entry['sizes']) == 6
  theirs = dict(entry['config'])
  if (theirs.get('rope_scaling') or {}).get('type') == 'su':  # transformers 5 no longer knows the old name
    theirs['rope_scaling'] = theirs['rope_scaling'] | {'type': 'longrope'}
  config = transformers.AutoConfig.for_model(**theirs)
  expected = (config.num_hidden_layers, config.vocab_size, config.hidden_size)
  assert (num_layers, spec.vocab_size, spec.d_model) == expected
  assert spec.tied == config.tie_word_embeddings
  window = getattr(config, 'sliding_window', None) or 0
  kinds = getattr(config, 'layer_types', None) or ['sliding_attention'] * num_layers
  if entry['config']['model_type'] != 'llama':
    window_L = [window if kind == 'sliding_attention' else 0 for kind in kinds]
    assert list(spec.window_L or [0] * num_layers) == window_L


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name not in READ])
def test_a_published_config_is_refused_for_a_documented_reason(name):
  entry = PUBLISHED[name]
  with pytest.raises(InputError) as caught:
    read(entry['config'])
  one_sentence(caught.value.for_command(), 'config.json', entry['expect'])
  assert len(str(caught.value)) < 250
  assert entry['doc'].lower() in REFUSED.split('refused by name', 1)[1].lower()
  assert entry['named'].lower() not in SUPPORTED.lower()


@pytest.mark.parametrize('name', [name for name in READ if 'buffers' in PUBLISHED[name]])
def test_buffers_of_old_files_have_a_row(name):
  family = families.FAMILIES[PUBLISHED[name]['config']['model_type']]
  for buffer in PUBLISHED[name]['buffers']:
    full = buffer if buffer in family.WEIGHTS else next(iter(family.WEIGHTS)).partition('.')[0] + '.' + buffer
    assert family.WEIGHTS[full] is None


@pytest.mark.parametrize('name', READ)
def test_the_config_of_a_pruned_model_is_read(name):
  config = PUBLISHED[name]['config']
  family, (spec, num_layers) = families.FAMILIES[config['model_type']], read(config)
  kept = [l for l in range(num_layers) if l not in (1, 3)]
  again = read(pruned_config(family, config, kept, 'bfloat16'))
  assert again == (spec.with_layers(kept), num_layers - 2)


# ---- what transformers writes ----


def config_class(kind: str):
  return type(transformers.AutoConfig.for_model(kind))


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_every_field_of_transformers_is_read(kind):
  config = config_class(kind)().to_dict()
  known = (
    set(config) | NEUTRAL | {'kwargs'} | set(config_class(kind).attribute_map)
  )  # attribute_map holds other names of keys
  assert set(inspect.signature(config_class(kind)).parameters) <= known
  spec, num_layers = read(config)
  assert (
    num_layers == config.get('num_hidden_layers', config.get('n_layer')) and spec.vocab_size == config['vocab_size']
  )


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_defaults_are_those_of_transformers(kind):
  """An absent key has the default of transformers. Only sizes without a default are required."""
  whole = config_class(kind)().to_dict()
  expected = read(whole)
  for key in set(whole) - {'model_type', 'vocab_size', 'rope_parameters'}:
    less = {k: v for k, v in whole.items() if k != key}
    try:
      assert read(less) == expected, key
    except InputError as error:
      assert f'{key}=None must be a whole number' in str(error), key


@pytest.mark.parametrize('kind', ['mistral', 'qwen2', 'qwen3', 'gemma2', 'gemma3_text'])
def test_an_absent_window_has_the_default_and_null_means_none(kind):
  config = {k: v for k, v in of_family(kind).items() if k != 'sliding_window'} | {'use_sliding_window': True}
  config |= {'max_window_layers': 2}
  if not kind.startswith('qwen'):
    del config['use_sliding_window'], config['max_window_layers']
  assert set(read(config)[0].window_L) - {0} == {4096}
  assert not any(read(config | {'sliding_window': None})[0].window_L)


@pytest.mark.parametrize('kind', ['qwen2', 'qwen3'])
def test_max_window_layers_is_written_even_if_it_was_absent(kind):
  config = of_family(kind) | {'num_hidden_layers': 32, 'sliding_window': 64, 'use_sliding_window': True}
  kept = list(range(1, 31))
  for absent in (config | {'max_window_layers': None}, {k: v for k, v in config.items() if k != 'max_window_layers'}):
    cut = pruned_config(families.FAMILIES[kind], absent, kept, '')
    assert cut['max_window_layers'] == 27 and read(cut)[0] == read(absent)[0].with_layers(kept)


# ---- keys and values that do not change the computation, and those that do ----


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_neutral_keys_are_ignored(kind):
  config, expected = of_family(kind), read(of_family(kind))
  for key in NEUTRAL - {'model_type'}:
    assert read(config | {key: config.get(key, 'anything')}) == expected
  for key, off in OFF.items():
    if (kind, key) != ('gpt_neox', 'attention_bias'):  # on by default
      assert read(config | {key: config.get(key, off)}) == expected
  nulls = {
    key: None for key in (*OFF, 'quantization_config', 'rope_scaling', 'head_dim', 'layer_types', 'not_known_here')
  }
  assert read(nulls | config) == expected


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_whole_numbers_may_be_written_without_a_decimal_point(kind):
  config = of_family(kind)
  whole = {k: int(v) for k, v in config.items() if isinstance(v, float) and v == int(v)}
  assert read(config | whole) == read(config)


@pytest.mark.parametrize('key', sorted(OFF))
def test_a_feature_that_is_on_is_refused(key):
  on = {bool: not OFF[key], int: 7, dict: {'0': [1]}}[type(OFF[key])]
  with pytest.raises(InputError) as caught:
    read(of_family('gpt2') | {key: on})
  one_sentence(caught.value.for_command(), f'{key}={on!r} is not supported')


def test_old_and_new_forms_of_rope_scaling():
  config = of_family('llama')
  linear = read(config | {'rope_scaling': {'type': 'linear', 'factor': 8}})
  assert linear != read(config)
  for table in (
    {'rope_type': 'linear', 'factor': 8.0},
    {'rope_type': 'linear', 'type': 'linear', 'factor': 8.0},
    {'rope_type': 'linear', 'factor': 8.0, 'low_freq_factor': None},
  ):
    assert read(config | {'rope_scaling': table}) == linear
  assert read(config | {'rope_scaling': {'type': 'default'}}) == read(config)
  with pytest.raises(InputError, match='mrope_section'):
    read(config | {'rope_scaling': {'type': 'default', 'mrope_section': [16, 24, 24]}})


# ---- activations ----


# Apertus supports only its own activation.
@pytest.mark.parametrize('kind', [kind for kind in families.FAMILIES if kind != 'apertus'])
def test_every_family_supports_every_activation(kind):
  config = of_family(kind)
  unread = {'starcoder2': {'activation_function'}}.get(kind, {'hidden_act'} if kind.startswith('gemma') else set())
  (key,) = {k for k in ACTIVATION_KEYS if k in config} - unread
  assert {name: read(config | {key: name})[0].activation for name in ACTIVATIONS} == ACTIVATIONS


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
  x = np.linspace(-12, 12, 4001, dtype=np.float32)
  expected = ACT2FN[name](torch.from_numpy(x)).numpy()
  np.testing.assert_allclose(layers.ACTIVATIONS[ACTIVATIONS[name]](jnp.asarray(x)), expected, rtol=0, atol=2e-6)


# ---- learned positions ----


@pytest.mark.parametrize('kind', ['gpt2', 'opt'])
def test_padding_beyond_the_learned_positions_makes_no_nan(kind):
  small = dict(n_embd=8, n_head=2, n_positions=6, hidden_size=8, ffn_dim=8, num_attention_heads=2, vocab_size=11)
  small |= dict(word_embed_proj_dim=8, max_position_embeddings=6)
  config = of_family(kind)
  spec, _ = read(config | {key: value for key, value in small.items() if key in config})
  model = Decoder(spec, 2, jax.random.key(0))
  tokens_BT = jnp.arange(9)[None]
  got_BTD, _ = jax.jit(forward)(model, tokens_BT)
  expected_BTD, _ = jax.jit(forward)(model, tokens_BT[:, :6])
  np.testing.assert_allclose(got_BTD[:, :6], expected_BTD, rtol=0, atol=1e-5)
