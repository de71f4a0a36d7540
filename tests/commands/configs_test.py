"""The flag files: each one parses, passes the checks that need no model, and has a mesh that divides its model."""

import json
import pathlib

import jax
from jax.sharding import AbstractMesh
import pytest

from elder_jax.commands.flags import BadFlags
from elder_jax.commands.flags import parse
from elder_jax.commands.prune import GROUPS
from elder_jax.devices import sharding
from elder_jax.hf import families
from elder_jax.hf.table import abstract_decoder
from elder_jax.run.config import Config

FOLDER = pathlib.Path(__file__).parents[2] / 'configs'
CONFIGS = sorted(path for path in FOLDER.glob('*.flags') if not path.name.startswith('_'))

LLAMA2 = dict(model_type='llama', vocab_size=32000, rms_norm_eps=1e-5)
OPT = dict(model_type='opt', vocab_size=50272, max_position_embeddings=2048)
# The sizes in the models' own config.json files.
LLAMA_7B = dict(
  LLAMA2,
  hidden_size=4096,
  intermediate_size=11008,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=32,
)
MODELS = {
  'meta-llama/Llama-2-7b-hf': LLAMA_7B,
  'meta-llama/Llama-2-13b-hf': dict(
    LLAMA2,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
  ),
  'meta-llama/Llama-2-70b-hf': dict(
    LLAMA2,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
  ),
  'meta-llama/Meta-Llama-3-8B': dict(
    LLAMA2,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rope_theta=500000.0,
  ),
  'facebook/opt-2.7b': dict(
    OPT, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32
  ),
  'facebook/opt-13b': dict(
    OPT, hidden_size=5120, word_embed_proj_dim=5120, ffn_dim=20480, num_hidden_layers=40, num_attention_heads=40
  ),
  'microsoft/phi-2': dict(
    model_type='phi',
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=2048,
    partial_rotary_factor=0.4,
    layer_norm_eps=1e-5,
  ),
  'Qwen/Qwen2-7B': dict(
    model_type='qwen2',
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_window_layers=28,
    use_sliding_window=False,
  ),
}
# config: (its slice, number of chips). v4 and v5p slices are named after their cores, of which a chip has two.
SLICES = {
  'llama7b': ('v5e-16', 16),
  'llama13b': ('v5e-32', 32),
  'llama70b': ('v5p-128', 64),
  'llama3_8b': ('v6e-16', 16),
  'opt2b7': ('v5e-8', 8),
  'opt13b': ('v5e-32', 32),
  'phi2': ('v5e-8', 8),
  'qwen2_7b': ('v5e-16', 16),
  'paper_llama7b': ('8 devices', 8),
}


def read(path: pathlib.Path) -> Config:
  return Config.of(**parse(list(GROUPS.values()), [f'--flagfile={path}']).settings)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.name)
def test_flag_file(path):
  config = read(path)
  assert config.data.train_data and config.evaluation.eval_data
  assert pathlib.Path(config.paths.workdir).name == path.stem
  about = config.removal.method, config.removal.recipe, config.gates.gate, config.training.order
  assert (about == (('elder',), 'regularize', 'output', 'joint')) == path.name.startswith('paper_')
  assert path.read_text().startswith(f'# python -m elder_jax.main --flagfile=configs/{path.name}')
  one_device = ('smollm2_', 'gemma3_270m', 'llama7b_24gb', 'llama7b_80gb')
  assert path.stem in SLICES or path.stem.removeprefix('paper_').startswith(one_device)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.name)
def test_a_config_is_found_by_name_and_read_back_from_json(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  by_name = Config.of(**parse(list(GROUPS.values()), [f'--config={path.stem}']).settings)
  assert by_name == read(path)
  (tmp_path / 'config.json').write_text(json.dumps(by_name.to_json()))
  again = parse(list(GROUPS.values()), ['--config=config.json', '--seed=7']).settings
  assert Config.of(**again) == by_name.replace(seed=7)


def test_a_config_json_of_an_earlier_version(tmp_path):
  """It has lists as text with commas, texts as name=source, and a setting that no longer exists."""
  before = dict(num_remove=None, ratio='0.25,0.1', method='auto,sleb', mesh='1,-1,1', compare=['none', 'regularize'])
  before |= dict(eval_data=['a=a.txt', 'b=b=b.txt'], tasks='piqa, arc_easy', remove_layers=None, gone=1, shuffle=False)
  (tmp_path / 'config.json').write_text(json.dumps(before))
  config = Config.of(**parse(list(GROUPS.values()), [f'--config={tmp_path}/config.json']).settings)
  assert config == Config.of(
    ratio=(0.25, 0.1),
    method=('auto', 'sleb'),
    mesh=(1, -1, 1),
    compare=('none', 'regularize'),
    eval_data={'a': 'a.txt', 'b': 'b=b.txt'},
    tasks=('piqa', 'arc_easy'),
    shuffle=False,
  )


@pytest.mark.parametrize(
  'name, expected',
  [
    ('llama7', 'did you mean llama7b'),
    ('nothing_like_it', 'the built-in configs are: gemma3_270m_anchor, gemma3_270m_choices, '),
    ('bad.json', 'is not the config.json of a run'),
    ('_wikitext2', 'the built-in configs are'),
  ],
)
def test_an_unknown_or_damaged_config(name, expected, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'bad.json').write_text('[1]')
  with pytest.raises(BadFlags, match=expected):
    parse(list(GROUPS.values()), [f'--config={name}'])


def mesh_of(config: Config, chips: int) -> AbstractMesh:
  """The mesh without devices; -1 is replaced as on real devices."""
  made = sharding.make_mesh(config.computation.mesh, [None] * chips)
  return AbstractMesh(tuple(made.shape.values()), tuple(made.shape), axis_types=made.axis_types)


@pytest.mark.parametrize('name', SLICES)
def test_mesh_fits_slice_and_model(name):
  path = FOLDER / f'{name}.flags'
  config, (slice_, chips) = read(path), SLICES[name]
  header = path.read_text().partition('\n--')[0]
  assert slice_ in header and (chips == int(slice_.split()[0].rpartition('-')[2]) or f'{chips} chips' in header)
  about = MODELS[config.paths.model]
  spec, num_layers = families.FAMILIES[about['model_type']].spec_from_config(about)
  assert config.removal.num_remove == num_layers // 4
  if name != 'paper_llama7b':  # uses all available devices
    assert min(config.computation.mesh) > 0
  mesh = mesh_of(config, chips)  # raises if the product of the sizes is not the number of chips
  sharding.for_model(abstract_decoder(spec, num_layers), mesh, config.computation.mesh)
  for what in (config.data.batch_size // config.training.grad_accum, config.evaluation.eval_batch_size):
    sharding.check_batch(mesh, config.computation.mesh, what, 'batch')
  assert not spec.num_heads % mesh.shape['tp'] and not spec.num_kv_heads % mesh.shape['tp']
  assert not spec.d_model % mesh.shape['fsdp']
  if spec.num_positions:
    assert max(config.data.seq_len, config.evaluation.eval_seq_len) <= spec.num_positions


def test_meshes_that_do_not_fit_are_refused():
  """Shows that the test above can fail."""
  spec, num_layers = families.FAMILIES['llama'].spec_from_config(MODELS['meta-llama/Llama-2-70b-hf'])
  model = abstract_decoder(spec, num_layers)
  mesh = AbstractMesh((1, 4, 16), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
  with pytest.raises(sharding.InputError, match='tp=16 does not divide a size of 8'):
    sharding.for_model(model, mesh, (1, 4, 16))
  with pytest.raises(sharding.InputError, match='needs 32 devices'):
    sharding.make_mesh((1, 4, 8), [None] * 64)
