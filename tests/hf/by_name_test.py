"""Layers cut from file to file, by the names of tensors, from models that the decoder does not know."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
from tiny import config_of
import torch
import transformers

from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.hf import copies
from elder_jax.hf import manifest
from elder_jax.hf import safetensors_files
from elder_jax.hf.by_name import folder as by_name
from elder_jax.hf.by_name import keys
from elder_jax.hf.by_name import layer_list
from elder_jax.hf.verify import ExportMismatch
from elder_jax.run import by_name as run_by_name
from elder_jax.run import plan
from elder_jax.run import series

pytestmark = pytest.mark.filterwarnings('ignore')

V = 96
SIZES = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=48,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=128,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
VISION = dict(
  hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=8
)


def mixtral():
  sizes = SIZES | dict(num_hidden_layers=5, num_local_experts=4, num_experts_per_tok=2)
  return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def deepseek_v3():
  latent = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
  experts = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    moe_intermediate_size=16,
    first_k_dense_replace=3,
  )
  sizes = {k: v for k, v in SIZES.items() if k != 'head_dim'} | dict(num_hidden_layers=6, num_key_value_heads=4)
  return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes | latent | experts))


def qwen3_next():
  linear = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_hidden_layers=8,
  )
  experts = EXPERTS | dict(shared_expert_intermediate_size=16, decoder_sparse_step=2, mlp_only_layers=[3])
  return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SIZES | linear | experts))


def llama4():
  sizes = SIZES | dict(num_hidden_layers=8, intermediate_size_mlp=48, num_local_experts=4, interleave_moe_layer_step=2)
  text = sizes | dict(attention_chunk_size=16, num_experts_per_tok=1, no_rope_layers=[])
  return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text))


def gemma3():
  text = SIZES | dict(num_hidden_layers=7, sliding_window=8, sliding_window_pattern=3, query_pre_attn_scalar=8)
  config = transformers.Gemma3Config(
    text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90
  )
  return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl():
  vision = dict(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    fullatt_block_indexes=[1],
    window_size=16,
  )
  rope = dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=10000.0)
  sizes = {k: v for k, v in SIZES.items() if k != 'head_dim'}
  text = sizes | dict(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
  config = transformers.Qwen2_5_VLConfig(
    text_config=text | dict(rope_parameters=rope), vision_config=vision, image_token_id=90, video_token_id=91
  )
  return transformers.Qwen2_5_VLForConditionalGeneration(config)


def lfm2():
  sizes = SIZES | dict(num_hidden_layers=6, full_attn_idxs=[2, 4], block_multiple_of=8)
  return transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes))


def falcon_h1():
  mamba = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
  return transformers.FalconH1ForCausalLM(transformers.FalconH1Config(**SIZES | mamba | dict(num_hidden_layers=5)))


def nemotron_h():
  mamba = dict(mamba_num_heads=4, mamba_head_dim=8, n_groups=1, ssm_state_size=8, chunk_size=8)
  sizes = {k: v for k, v in SIZES.items() if k != 'num_hidden_layers'} | dict(hybrid_override_pattern='M-M*-M*-')
  return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**sizes | mamba))


def gpt_oss(**more):
  sizes = SIZES | dict(num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=8) | more
  return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


# Model -> (its list of layers, layers to remove, what config.json says of those that are left)
CASES = {
  mixtral: ('model.layers', [1, 3], {}),
  deepseek_v3: ('model.layers', [1, 4], {'first_k_dense_replace': 2}),
  qwen3_next: ('model.layers', [1, 6], {'decoder_sparse_step': 1, 'mlp_only_layers': [0, 1, 2, 3]}),
  llama4: ('model.layers', [1, 2], {'moe_layers': [1, 3, 5], 'no_rope_layers': [1, 0, 1, 1, 1, 0]}),
  gemma3: ('model.language_model.layers', [0, 4], {}),
  qwen2_5_vl: ('model.language_model.layers', [1, 5], {'max_window_layers': 2}),
  lfm2: ('model.layers', [1, 4], {'full_attn_idxs': [1]}),
  falcon_h1: ('model.layers', [2], {}),
  nemotron_h: ('model.layers', [2, 3], {}),
  gpt_oss: ('model.layers', [0, 3], {}),
}


@pytest.fixture
def no_decoder(monkeypatch):
  """Models for pictures whose language model the decoder knows are cut as if it did not."""
  monkeypatch.setattr(run_by_name, '_why_not_decoder', lambda model: 'a test says so')


def save(make, folder: pathlib.Path) -> pathlib.Path:
  torch.manual_seed(0)
  with torch.device('cpu'):
    model = make()
  for name, parameter in model.named_parameters():
    if 'norm' not in name.lower():
      torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(folder, max_shard_size='40KB')
  return folder


def cut(folder: pathlib.Path, work: pathlib.Path, removed: list[int], **more) -> pathlib.Path:
  settings = dict(model=str(folder), workdir=str(work), remove_layers=removed, recipe='none', compare=())
  report = series.run(config_of(**settings | more))
  assert report['removed'] == removed
  return work / 'export'


def load(make, folder: pathlib.Path):
  return type(make()).from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
  tokens = torch.randint(3, 80, (2, 24), generator=torch.Generator().manual_seed(0))
  with torch.no_grad():
    return model(input_ids=tokens, use_cache=False).logits


def without(model, at: str, removed: list[int]):
  """The model with these modules deleted, and the lists by which its forward pass goes."""
  owner, _, name = at.rpartition('.')
  parent = model.get_submodule(owner)
  kept = [l for l in range(len(getattr(parent, name))) if l not in removed]
  setattr(parent, name, torch.nn.ModuleList(getattr(parent, name)[l] for l in kept))
  config = parent.config
  for key in ('layer_types', 'layers_block_type', 'no_rope_layers'):
    if isinstance(value := vars(config).get(key), list):
      setattr(config, key, [value[l] for l in kept])
  if 'num_hidden_layers' in vars(config):
    config.num_hidden_layers = len(kept)
  return model


@pytest.mark.parametrize('make', CASES, ids=lambda make: make.__name__)
def test_the_cut_folder_is_the_original_with_modules_deleted_to_the_bit(make, tmp_path, no_decoder):
  at, removed, expected = CASES[make]
  source = save(make, tmp_path / 'source')
  export = cut(source, tmp_path / 'work', removed)
  got = logits(load(make, export))
  assert torch.equal(got, logits(without(load(make, source), at, removed))) and torch.isfinite(got).all()
  assert not torch.equal(got, logits(load(make, source)))
  config = json.loads((export / 'config.json').read_text())
  told = config.get('text_config', config)
  assert {key: told[key] for key in expected} == expected
  assert manifest.check(export) > 3


def mxfp4(folder: pathlib.Path) -> pathlib.Path:
  """gpt-oss as it is published: the experts' matrices in blocks of 32 four-bit numbers."""
  random, D, F, E = np.random.default_rng(0), 32, 64, 4
  save(lambda: gpt_oss(intermediate_size=F), folder)
  sizes = {'gate_up_proj': (2 * F, D // 32), 'down_proj': (D, F // 32)}
  return rewrite(folder, lambda name, tensor: packed(name, tensor, sizes, random, E), method='mxfp4')


def packed(name, tensor, sizes, random, E):
  part = name.rpartition('.')[2]
  if part not in sizes:
    return {name: tensor}
  rows, blocks = sizes[part]
  return {
    f'{name}_blocks': torch.from_numpy(random.integers(0, 256, (E, rows, blocks, 16), np.uint8)),
    f'{name}_scales': torch.from_numpy(random.integers(120, 127, (E, rows, blocks), np.uint8)),
  }


def fp8(folder: pathlib.Path) -> pathlib.Path:
  """A Qwen2 with block scales, as DeepSeek's and Qwen's fp8 files."""

  def make():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**FP8))

  save(make, folder)

  def halved(name, tensor):
    if not name.endswith('proj.weight') or '.layers.4.mlp' in name:
      return {name: tensor}
    scale = tensor.abs().max() / 448
    return {
      name: (tensor / scale).to(torch.float8_e4m3fn),
      f'{name}_scale_inv': scale.float().expand(-(-tensor.shape[0] // 128), -(-tensor.shape[1] // 128)).contiguous(),
    }

  return rewrite(folder, halved, method='fp8')


FP8 = {k: v for k, v in SIZES.items() if k != 'head_dim'} | dict(num_hidden_layers=5)


def rewrite(folder: pathlib.Path, change, method: str) -> pathlib.Path:
  """The folder with its tensors changed, in two shards, and a quantization_config."""
  tensors = {}
  for path in sorted(folder.glob('*.safetensors')):
    for name, tensor in safetensors.torch.load_file(path).items():
      tensors |= change(name, tensor)
    path.unlink()
  names = sorted(tensors)
  halves = [names[::2], names[1::2]]
  files = [f'model-0000{i + 1}-of-00002.safetensors' for i in range(2)]
  for file, half in zip(files, halves):
    safetensors.torch.save_file({name: tensors[name] for name in half}, folder / file, metadata={'format': 'pt'})
  weight_map = {name: file for file, half in zip(files, halves) for name in half}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  path = folder / 'config.json'
  left = ['model.layers.4.mlp', 'model.layers.1.self_attn', 'lm_head', 'model.embed_tokens']
  left = left if method == 'fp8' else ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'lm_head']
  about = {'quant_method': method, 'modules_to_not_convert': left}
  about |= {'weight_block_size': [128, 128], 'activation_scheme': 'dynamic'} if method == 'fp8' else {}
  path.write_text(json.dumps(json.loads(path.read_text()) | {'quantization_config': about}))
  return folder


def octets(folder: pathlib.Path) -> dict[str, tuple]:
  found = {}
  for path in folder.glob('*.safetensors'):
    begin, header = safetensors_files._data_begins(path)
    for name, about in header.items():
      first, end = about['data_offsets']
      found[name] = about['dtype'], about['shape'], path.read_bytes()[begin + first : begin + end]
  return found


@pytest.mark.parametrize('quantised', [mxfp4, fp8], ids=lambda f: f.__name__)
def test_quantised_weights_are_copied_octet_for_octet(quantised, tmp_path):
  source = quantised(tmp_path / 'source')
  export = cut(source, tmp_path / 'work', [1, 2])
  before, after = octets(source), octets(export)
  kept = [l for l in range(5 if quantised is fp8 else 6) if l not in (1, 2)]
  expected = {n: a for n, a in before.items() if not n.startswith('model.layers.')}
  for new, old in enumerate(kept):
    prefix = f'model.layers.{old}.'
    expected |= {n.replace(prefix, f'model.layers.{new}.'): a for n, a in before.items() if n.startswith(prefix)}
  assert after == expected and {'F8_E4M3', 'U8'} & {kind for kind, *_ in after.values()}
  assert sorted(p.name for p in export.glob('*.safetensors')) == sorted(p.name for p in source.glob('*.safetensors'))
  index = json.loads((export / 'model.safetensors.index.json').read_text())['weight_map']
  assert index.keys() == after.keys()
  if quantised is fp8:
    told = json.loads((export / 'config.json').read_text())['quantization_config']['modules_to_not_convert']
    assert told == ['model.layers.2.mlp', 'lm_head', 'model.embed_tokens']
  classes = {fp8: transformers.Qwen2ForCausalLM, mxfp4: transformers.GptOssForCausalLM}
  models = [classes[quantised].from_pretrained(folder, dtype=torch.float32).eval() for folder in (export, source)]
  got, whole = logits(models[0]), logits(models[1])
  assert torch.equal(got, logits(without(models[1], 'model.layers', [1, 2]))) and not torch.equal(got, whole)


# ---- what is refused ----


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
  'key', ['first_k_dense_replace', 'mlp_only_layers', 'no_rope_layers', 'max_window_layers', 'layer_types']
)
def test_a_key_that_was_forgotten_is_seen_by_the_layers_that_transformers_makes(key, tmp_path, monkeypatch, no_decoder):
  make, removed = {
    'first_k_dense_replace': (deepseek_v3, [1]),
    'mlp_only_layers': (qwen3_next, [0]),
    'no_rope_layers': (llama4, [1, 2]),
    'max_window_layers': (qwen2_5_vl, [1]),
    'layer_types': (gpt_oss, [0]),
  }[key]
  source = save(make, tmp_path / 'source')
  monkeypatch.setitem(keys.RULES, key, lambda key, value, cut: {key: value})
  if key == 'mlp_only_layers':
    monkeypatch.setitem(keys.RULES, 'decoder_sparse_step', lambda key, value, cut: {key: value})
  if key == 'layer_types':
    monkeypatch.setitem(keys.RULES, key, lambda key, value, cut: {key: value[: len(cut.kept)]})
  if key == 'max_window_layers':
    edit = json.loads((source / 'config.json').read_text())
    del edit['text_config']['layer_types']
    (source / 'config.json').write_text(json.dumps(edit))
    monkeypatch.setattr(keys, '_write_lists', lambda *_: None)
  if key == 'no_rope_layers':
    monkeypatch.setattr(keys, '_write_lists', lambda *_: None)
  with pytest.raises(InputError, match='would become another kind of layer'):
    cut(source, tmp_path / 'work', removed)


def test_a_list_is_named_where_there_are_several(tmp_path, no_decoder):
  source = save(gemma3, tmp_path / 'source')
  export = cut(source, tmp_path / 'work', [1], layers_at='vision_tower.encoder.layers')
  config = json.loads((export / 'config.json').read_text())
  assert config['vision_config']['num_hidden_layers'] == 2 and config['text_config']['num_hidden_layers'] == 7
  with pytest.raises(InputError, match=r'layers_at=nothing.*there are .*language_model.model.layers \(7\)'):
    cut(source, tmp_path / 'other', [1], layers_at='nothing')
  settings = dict(model=str(source), workdir=str(tmp_path / 'third'), layers_at='x', remove_layers=[1], compare=())
  with pytest.raises(InputError, match='layers_at=x.*only cut'):
    series.run(config_of(**settings))
  with pytest.raises(InputError, match='export_dtype=bfloat16.*copied as they are'):
    cut(source, tmp_path / 'fourth', [1], export_dtype='bfloat16')
  with pytest.raises(InputError, match='text_only.*every tensor is copied'):
    cut(source, tmp_path / 'fourth', [1], text_only=True)
  with pytest.raises(InputError, match='remove_layers.*9 is not a layer'):
    cut(source, tmp_path / 'fifth', [9])


def test_a_cut_that_was_killed_is_done_again_and_a_finished_one_is_told(tmp_path, monkeypatch):
  source = save(mixtral, tmp_path / 'source')
  size = copies.PIECE
  monkeypatch.setattr(copies, 'PIECE', 512)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, '_signalled', True)
    with pytest.raises(preemption.Preempted):
      cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work' / 'export').exists()
  export = cut(source, tmp_path / 'work', [2])
  written = octets(export)
  monkeypatch.setattr(copies, 'PIECE', size)
  monkeypatch.setattr(by_name, 'open_checkpoint', None)
  assert octets(cut(source, tmp_path / 'work', [2])) == written
  assert json.loads((tmp_path / 'work/report.json').read_text())['verify'] == {'tensors': len(written)}


def test_a_copy_that_is_not_the_original_is_seen(tmp_path, monkeypatch):
  source = save(mixtral, tmp_path / 'source')
  write = by_name.write

  def spoilt(checkpoint, kept, config, folder, *more):
    hashes = write(checkpoint, kept, config, folder, *more)
    path = next(folder.glob('*.safetensors'))
    path.write_bytes(path.read_bytes()[:-1] + b'\1')
    return hashes

  monkeypatch.setattr(by_name, 'write', spoilt)
  with pytest.raises(ExportMismatch, match='is not what was copied'):
    cut(source, tmp_path / 'work', [2])
  assert not (tmp_path / 'work' / 'export').exists()


def test_layers_that_predict_further_tokens_stay_behind_the_others():
  layers = layer_list.find(
    [f'model.layers.{l}.w' for l in range(5)], dict(num_hidden_layers=4, num_nextn_predict_layers=1), 'x'
  )
  assert [layers.renamed(f'model.layers.{l}.w', [0, 3]) for l in range(5)] == [
    'model.layers.0.w',
    None,
    None,
    'model.layers.1.w',
    'model.layers.2.w',
  ]
  assert layers.renamed('lm_head.weight', [0]) == 'lm_head.weight'


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
