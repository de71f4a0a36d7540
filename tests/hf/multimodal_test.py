"""The language model of a folder with a vision encoder: read, cut, trained, and written back to the folder."""

import json
import pathlib

import jax
import numpy as np
import pytest
from refusal import one_sentence
import safetensors.numpy
from tiny import config_of
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf import multimodal
from elder_jax.hf.families import FAMILIES
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline

pytestmark = pytest.mark.filterwarnings('ignore')

DATA = pathlib.Path(__file__).parents[1] / 'data'
SIZES = dict(
  vocab_size=260,
  hidden_size=32,
  intermediate_size=48,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=128,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)
VISION = dict(
  hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=8
)


def gemma3():
  rope = {
    'full_attention': dict(rope_type='linear', factor=8.0, rope_theta=1e6),
    'sliding_attention': dict(rope_type='default', rope_theta=1e4),
  }
  text = SIZES | dict(num_hidden_layers=7, head_dim=8, sliding_window=8, query_pre_attn_scalar=8, rope_parameters=rope)
  return transformers.Gemma3ForConditionalGeneration(
    transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90)
  )


def mistral3(**more):
  text = SIZES | dict(num_hidden_layers=5, head_dim=8, model_type='mistral', rope_parameters=dict(rope_theta=1e6))
  vision = VISION | dict(head_dim=8, model_type='pixtral')
  config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=90, **more)
  return transformers.Mistral3ForConditionalGeneration(config)


def mistral3_with_a_head():
  return mistral3(tie_word_embeddings=False)


def qwen2_5_vl():
  vision = dict(depth=3, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32)
  rope = dict(rope_type='default', mrope_section=[1, 1, 2], rope_theta=1e6)
  text = SIZES | dict(num_hidden_layers=6, use_sliding_window=True, sliding_window=8, max_window_layers=3)
  config = transformers.Qwen2_5_VLConfig(
    text_config=text | dict(rope_parameters=rope),
    vision_config=vision | dict(fullatt_block_indexes=[1], window_size=16),
    image_token_id=90,
    video_token_id=91,
  )
  return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_5():
  vision = dict(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, out_hidden_size=32)
  delta = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16)
  text = SIZES | delta | dict(num_hidden_layers=6, head_dim=16, full_attention_interval=2)
  config = transformers.Qwen3_5Config(
    text_config=text, vision_config=vision | dict(num_position_embeddings=16), image_token_id=90, video_token_id=91
  )
  return transformers.Qwen3_5ForConditionalGeneration(config)


MODELS = [gemma3, mistral3, mistral3_with_a_head, qwen2_5_vl, qwen3_5]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def folder(request, tmp_path, tiny) -> pathlib.Path:
  return save(request.param, tmp_path / 'source', tiny)


def save(make, path: pathlib.Path, tokenizer: pathlib.Path) -> pathlib.Path:
  torch.manual_seed(0)
  model = make()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if 'norm' in name:
        continue  # keeps the initial values: 0 in Gemma, 1 in the others
      p.normal_(0.0, 0.5 if 'conv1d' in name else 0.1 if p.ndim > 1 else 0.03)
  model.save_pretrained(path)
  for file in tokenizer.glob('*token*'):
    (path / file.name).write_bytes(file.read_bytes())
  (path / 'preprocessor_config.json').write_text('{"image_mean": [0.5, 0.5, 0.5]}')
  return path


def tokens(length: int = 24) -> np.ndarray:
  return np.random.default_rng(0).integers(100, 250, (2, length), np.int32)


def of_torch(path: pathlib.Path, kind=transformers.AutoModelForImageTextToText):
  model, info = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  return model.eval()


def torch_logits(model) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(tokens(), dtype=torch.long)).logits.numpy()


def logits(path: pathlib.Path) -> np.ndarray:
  source = open_source(str(path), path)
  with jax.default_matmul_precision('highest'):
    model = load_model(source, 'float32')
    return np.asarray(logits_of(model, forward(model, tokens())[0]))


def bytes_of(path: pathlib.Path) -> dict[str, bytes]:
  return {
    name: a.tobytes() for file in path.glob('*.safetensors') for name, a in safetensors.numpy.load_file(file).items()
  }


def of_pictures(tensors: dict[str, bytes]) -> dict[str, bytes]:
  return {name: a for name, a in tensors.items() if any(part in name for part in ('vis', 'projector'))}


def prune(path: pathlib.Path, work: pathlib.Path, text: pathlib.Path, **more) -> tuple[dict, pathlib.Path]:
  usual = dict(model=str(path), workdir=str(work), train_data=str(text), seq_len=32, num_sequences=8, batch_size=4)
  usual |= dict(num_remove=2, verify='torch', compare=(), checkpoint_every=0, prompts='none')
  return pipeline.run(config_of(**usual | more)), work / 'export'


def test_logits_on_text_equal_those_of_transformers(folder):
  np.testing.assert_allclose(logits(folder), torch_logits(of_torch(folder)), atol=1e-5)


@pytest.mark.parametrize(
  'make, begins',
  [
    (mistral3_with_a_head, {'model': 'language_model.model.', 'head': 'language_model.lm_head.', 'other': ''}),
    (mistral3_with_a_head, {'model': 'model.language_model.', 'head': 'lm_head.', 'other': 'model.'}),
    (qwen2_5_vl, {'model': 'model.', 'head': 'lm_head.', 'other': ''}),
    (qwen2_5_vl, {'model': 'model.language_model.', 'head': 'lm_head.', 'other': 'model.'}),
  ],
)
def test_names_of_every_version_of_transformers(make, begins, tiny, text, tmp_path):
  """Names in the hub's files, and those that versions from 4.52 on write."""
  path = save(make, tmp_path / 'source', tiny)
  expected = logits(path)
  tensors = safetensors.numpy.load_file(path / 'model.safetensors')
  ours = {there: name for name, there in multimodal.language_names(tensors).items()}

  def renamed(name: str) -> str:
    if name not in ours:
      return begins['other'] + name.removeprefix('model.')
    kind = 'head' if ours[name].startswith('lm_head') else 'model'
    return begins[kind] + ours[name].partition('.')[2]

  safetensors.numpy.save_file({renamed(n): a for n, a in tensors.items()}, path / 'model.safetensors', {'format': 'pt'})
  np.testing.assert_array_equal(logits(path), expected)
  assert np.abs(torch_logits(of_torch(path)) - expected).max() < 1e-5
  _, export = prune(path, tmp_path / 'work', text, recipe='absorb', method='shortgpt')
  assert bytes_of(export).keys() < set(map(renamed, tensors))


def test_training_keeps_the_vision_encoder_byte_for_byte(folder, text, tmp_path):
  report, export = prune(folder, tmp_path / 'work', text, recipe='prune_then_train', train_steps=2, method='shortgpt')
  assert report['verify']['torch'] < 1e-3 and 'torch_error' not in report['verify']
  before, after = bytes_of(folder), bytes_of(export)
  assert of_pictures(after) == of_pictures(before) != {}
  assert (export / 'preprocessor_config.json').exists()
  old, new = (json.loads((path / 'config.json').read_text()) for path in (folder, export))
  assert new['text_config'].pop('num_hidden_layers') == old['text_config'].pop('num_hidden_layers') - 2
  assert {k: v for k, v in new.items() if k != 'text_config'} == {k: v for k, v in old.items() if k != 'text_config'}
  np.testing.assert_allclose(logits(export), torch_logits(of_torch(export)), atol=1e-4)


@pytest.mark.parametrize('shard_gb', [5.0, 2e-5])
def test_cutting_layers_keeps_the_others_byte_for_byte(folder, shard_gb, tmp_path, text):
  _, export = prune(
    folder,
    tmp_path / 'work',
    text,
    num_remove=None,
    remove_layers='1,3',
    recipe='none',
    train_data='',
    shard_gb=shard_gb,
  )
  before, after = bytes_of(folder), bytes_of(export)
  kept = [l for l in range(7) if l not in (1, 3)]
  prefix = next(name for name in before if '.layers.0.mlp' in name and 'vis' not in name).partition('layers.')[0]
  old = {}
  for name in after:
    rest = name.removeprefix(f'{prefix}layers.')
    number, dot, tail = rest.partition('.')
    old[name] = f'{prefix}layers.{kept[int(number)]}{dot}{tail}' if rest != name else name
  assert {name: before[old[name]] for name in after} == after
  removed = {f'{prefix}layers.{l}.' for l in (1, 3)}
  assert {name for name in before if not any(map(name.startswith, removed))} == set(old.values())


def test_text_only_exports_the_language_model_alone(folder, tmp_path, text):
  _, whole = prune(folder, tmp_path / 'a', text, recipe='absorb', method='shortgpt')
  report, export = prune(folder, tmp_path / 'b', text, recipe='absorb', method='shortgpt', text_only=True)
  assert 'torch_error' not in report['verify']
  config = json.loads((export / 'config.json').read_text())
  assert config['model_type'] in FAMILIES and not of_pictures(bytes_of(export))
  assert not (export / 'preprocessor_config.json').exists()
  np.testing.assert_allclose(
    torch_logits(of_torch(export, transformers.AutoModelForCausalLM)), torch_logits(of_torch(whole)), atol=1e-5
  )


def test_text_only_of_a_text_model_is_refused(tiny, tmp_path, text):
  with pytest.raises(InputError) as e:
    prune(tiny, tmp_path / 'work', text, recipe='absorb', method='shortgpt', text_only=True)
  one_sentence(e.value.for_command(), '--text_only', 'text-only model already')


PUBLISHED = json.loads((DATA / 'published_multimodal_configs.json').read_text())


@pytest.mark.parametrize('name', [name for name in PUBLISHED if name != '_about'])
def test_a_published_config_is_read(name):
  entry = PUBLISHED[name]
  assert multimodal.is_multimodal(entry['config'])
  config = multimodal.language_config(entry['config'])
  spec, num_layers = FAMILIES[config['model_type']].spec_from_config(config)
  theirs = transformers.AutoConfig.for_model(**entry['config'])
  text = theirs.get_text_config()
  assert (num_layers, spec.vocab_size, spec.d_model) == (text.num_hidden_layers, text.vocab_size, text.hidden_size)
  assert (num_layers, spec.d_model) == (entry['layers'], entry['width'])
  assert (spec.num_heads, spec.num_kv_heads, spec.norm_eps) == (
    text.num_attention_heads,
    text.num_key_value_heads,
    text.rms_norm_eps,
  )
  assert spec.tied == theirs.tie_word_embeddings
  rope = text.rope_parameters
  theta = rope.get('full_attention', rope)['rope_theta']
  assert any(freq_H[1] / freq_H[0] == pytest.approx(theta ** (-1 / len(freq_H))) for freq_H in spec.rope_freq_RH)


@pytest.mark.parametrize(
  'table, expected',
  [
    ({'type': 'mrope', 'mrope_section': [1, 1, 2]}, None),
    ({'rope_type': 'default', 'mrope_section': [1, 1, 2], 'rope_theta': 5.0}, {'rope_theta': 5.0}),
    ({'type': 'yarn', 'factor': 4.0, 'mrope_section': [1, 1, 2]}, {'type': 'yarn', 'factor': 4.0}),
  ],
)
def test_text_ignores_mrope_sections(table, expected):
  config = {'model_type': 'qwen2_5_vl', 'rope_scaling': table}
  assert multimodal.language_config(config)['rope_scaling'] == expected
