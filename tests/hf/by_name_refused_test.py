"""Cutting by tensor names: models unknown to transformers, and config.json files that cannot describe the rest."""

import json
import pathlib

import pytest
from strangers import cut
from strangers import mixtral
from strangers import save
from tiny import config_of

from elder_jax.errors import InputError
from elder_jax.hf.by_name import keys
from elder_jax.run import plan

pytestmark = pytest.mark.filterwarnings('ignore')


def edited(folder: pathlib.Path, **keys) -> pathlib.Path:
  path = folder / 'config.json'
  path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | keys).items() if v is not None}))
  return folder


@pytest.mark.parametrize(
  ('added', 'sentence'),
  [
    (dict(layer_group_size=2), 'layer_group_size=2 is an unknown key that may describe layers'),
    (dict(shared_layers=[0, 1]), 'shared_layers=.* is an unknown list that may describe layers'),
    (dict(alphas=[0.1] * 5), 'alphas=.* is an unknown list with one entry per layer'),
    (dict(layer_types=['full_attention'] * 4), 'layer_types=.* has 4 entries for 5 layers'),
    (
      dict(full_attention_interval=4, layer_types=None),
      'defines layer_types, which transformers does not derive from it; add layer_types',
    ),
    (dict(moe_layer_freq=2), 'moe_layer_freq=2 selects layers by their number'),
    (dict(hidden_size_per_layer_input=8), 'gives each layer a slice of a shared tensor'),
    (
      dict(num_kv_shared_layers=2, layer_types=['a'] * 5),
      'makes the last layers read the keys and values of layer 2; keep that layer',
    ),
    (dict(num_hidden_layers=7), 'no list of layers in the tensor names .model.layers .5..* has the length'),
    (dict(is_encoder_decoder=True), 'has an encoder and a decoder'),
    (dict(text_config={'num_hidden_layers': 5}), 'gives the number of these layers twice'),
    (
      dict(quantization_config={'ignore': [r're:model\.layers\.0\..*']}),
      'names layers by the pattern .*, which cannot be renumbered',
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_a_key_that_cannot_describe_the_remaining_layers_is_named(added, sentence, tmp_path):
  source = edited(save(mixtral, tmp_path / 'source'), model_type='unknown_model', **added)
  with pytest.raises(InputError, match=sentence):
    cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work').exists()


def test_a_model_unknown_to_transformers_is_cut_by_tensor_names(tmp_path, capsys):
  source = edited(save(mixtral, tmp_path / 'source'), model_type='unknown_model', auto_map={'AutoConfig': 'a.B'})
  export = cut(source, tmp_path / 'work', [0, 2], verify='auto')
  printed = capsys.readouterr().err
  assert "model_type 'unknown_model' is not supported" in printed and 'from file to file' in printed
  config = json.loads((export / 'config.json').read_text())
  assert config['num_hidden_layers'] == 3 and 'auto_map' in config
  assert 'transformers does not support model_type' in (export / 'README.md').read_text()
  assert plan.plan(config_of(model=str(source), remove_layers=[0], recipe='none', compare=())) == 0
  assert 'copied from file to file' in capsys.readouterr().out
  with pytest.raises(InputError, match='verify=torch.*does not support model_type'):
    cut(source, tmp_path / 'again', [0, 2], verify='torch')


@pytest.mark.parametrize(
  ('value', 'kept', 'expected'),
  [
    (dict(attn_layer_period=8, attn_layer_offset=4), [0, 1, 4, 5], (3, 2)),
    (dict(attn_layer_period=4, attn_layer_offset=1), [0, 1, 3, 5, 6, 7], None),
    (dict(attn_layer_period=2, attn_layer_offset=1), [0, 2, 4], (4, 3)),
  ],
)
def test_a_new_period_is_found_or_refused(value, kept, expected):
  cut_of = keys.Cut(kept, 8, value, value)
  rule = keys.RULES['attn_layer_period']
  if expected is None:
    with pytest.raises(keys.Refused):
      rule('attn_layer_period', value['attn_layer_period'], cut_of)
    return
  assert tuple(rule('attn_layer_period', value['attn_layer_period'], cut_of).values()) == expected
