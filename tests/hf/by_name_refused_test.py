"""Models that nobody knows are cut by the names of tensors; what config.json cannot say of fewer layers is refused."""

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
    (dict(layer_group_size=2), 'layer_group_size=2 may tell of layers, and is not known here'),
    (dict(shared_layers=[0, 1]), 'shared_layers=.* may be a list of layers, and is not known here'),
    (dict(alphas=[0.1] * 5), 'alphas=.* has as many entries as there are layers'),
    (dict(layer_types=['full_attention'] * 4), 'layer_types=.* has 4 entries for 5 layers'),
    (dict(full_attention_interval=4, layer_types=None), 'is the rule of layer_types, which is not given'),
    (dict(moe_layer_freq=2), 'moe_layer_freq=2 is a pattern over the numbers of the layers'),
    (dict(hidden_size_per_layer_input=8), 'gives layers a part of a tensor that all of them share'),
    (
      dict(num_kv_shared_layers=2, layer_types=['a'] * 5),
      'the last layers read the keys and values of layer 2; keep it',
    ),
    (dict(num_hidden_layers=7), 'none of the lists in the names of the tensors .model.layers .5..* has the length'),
    (dict(is_encoder_decoder=True), 'has an encoder and a decoder'),
    (dict(text_config={'num_hidden_layers': 5}), 'gives the number of these layers twice'),
    (
      dict(quantization_config={'ignore': [r're:model\.layers\.0\..*']}),
      'names layers by the pattern .*, which cannot be renumbered',
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_what_cannot_be_made_right_is_refused_by_name(added, sentence, tmp_path):
  source = edited(save(mixtral, tmp_path / 'source'), model_type='of_a_stranger', **added)
  with pytest.raises(InputError, match=sentence):
    cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work').exists()


def test_a_model_that_nobody_knows_is_cut_by_its_names(tmp_path, capsys):
  source = edited(save(mixtral, tmp_path / 'source'), model_type='of_a_stranger', auto_map={'AutoConfig': 'a.B'})
  export = cut(source, tmp_path / 'work', [0, 2], verify='auto')
  told = capsys.readouterr().err
  assert "model_type 'of_a_stranger' is not supported" in told and 'from file to file' in told
  config = json.loads((export / 'config.json').read_text())
  assert config['num_hidden_layers'] == 3 and 'auto_map' in config
  assert 'transformers does not know model_type' in (export / 'README.md').read_text()
  assert plan.plan(config_of(model=str(source), remove_layers=[0], recipe='none', compare=())) == 0
  assert 'copied from file to file' in capsys.readouterr().out
  with pytest.raises(InputError, match='verify=torch.*does not know model_type'):
    cut(source, tmp_path / 'again', [0, 2], verify='torch')


@pytest.mark.parametrize(
  ('value', 'kept', 'expected'),
  [
    (dict(attn_layer_period=8, attn_layer_offset=4), [0, 1, 4, 5], (3, 2)),
    (dict(attn_layer_period=4, attn_layer_offset=1), [0, 1, 3, 5, 6, 7], None),
    (dict(attn_layer_period=2, attn_layer_offset=1), [0, 2, 4], (4, 3)),
  ],
)
def test_a_period_is_found_anew_or_refused(value, kept, expected):
  cut_of = keys.Cut(kept, 8, value, value)
  rule = keys.RULES['attn_layer_period']
  if expected is None:
    with pytest.raises(keys.Refused):
      rule('attn_layer_period', value['attn_layer_period'], cut_of)
    return
  assert tuple(rule('attn_layer_period', value['attn_layer_period'], cut_of).values()) == expected
