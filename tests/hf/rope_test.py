"""Scaled rotary embeddings compared with transformers, on texts shorter and longer than the original context."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run.prepare import _Texts
from elder_jax.text.decoding import decode_step
from elder_jax.text.decoding import prefill

pytestmark = pytest.mark.filterwarnings('ignore:.past_key_values. is deprecated:FutureWarning')
ORIGINAL = 16  # tokens of the original context
SIZES = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  initializer_range=0.1,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=None,
)
YARN = dict(rope_type='yarn', rope_theta=100.0, factor=4.0, original_max_position_embeddings=ORIGINAL)
LONG = dict(
  rope_type='longrope',
  rope_theta=100.0,
  short_factor=[1.0, 1.1, 1.3, 1.7],
  long_factor=[1.5, 2.0, 3.0, 4.0],
  original_max_position_embeddings=ORIGINAL,
)
DYNAMIC = dict(rope_type='dynamic', rope_theta=100.0, factor=2.0)
CASES = {
  'llama, yarn': YARN,
  'qwen2, yarn': YARN | dict(beta_fast=4.0, beta_slow=1.0),
  'qwen3, yarn with its own scale': YARN | dict(attention_factor=1.3, truncate=False),
  'llama, yarn by two scales': YARN | dict(mscale=1.0, mscale_all_dim=0.5),
  'mistral, yarn of a part': YARN | dict(factor=2.0),
  'phi3, longrope': LONG,
  'phi3, longrope of a part': LONG
  | dict(short_factor=[1.0, 1.2], long_factor=[1.5, 3.0], partial_rotary_factor=0.5, attention_factor=1.1),
  'llama, dynamic': DYNAMIC,
}


@pytest.fixture(scope='module', params=CASES)
def folder(request, tmp_path_factory) -> pathlib.Path:
  kind, path = request.param.split(',')[0], tmp_path_factory.mktemp('rope')
  torch.manual_seed(0)
  sizes = SIZES | (dict(sliding_window=None) if kind == 'mistral' else {})
  sizes |= dict(original_max_position_embeddings=ORIGINAL) if kind == 'phi3' else {}
  config = transformers.AutoConfig.for_model(kind, **sizes, rope_parameters=dict(CASES[request.param]))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
  return path


def tokens(length: int) -> np.ndarray:
  return np.random.default_rng(length).integers(2, 97, (2, length), np.int32)


def model_of(folder: pathlib.Path):
  return load_model(open_source(str(folder), folder), 'float32')


def torch_model(folder: pathlib.Path):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()


@pytest.mark.parametrize('length', [ORIGINAL - 6, ORIGINAL, ORIGINAL + 1, 50])
def test_logits_equal_those_of_transformers(folder, length):
  tokens_BT = tokens(length)
  with torch.no_grad():
    expected = torch_model(folder)(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()
  model = model_of(folder)
  with jax.default_matmul_precision('highest'):
    got = logits_of(model, forward(model, tokens_BT)[0])
  np.testing.assert_allclose(np.asarray(got), expected, atol=1e-5 * max(1.0, float(expected.std())))


@pytest.mark.parametrize('length', [ORIGINAL - 3, ORIGINAL + 5])
def test_decoding_with_a_cache_equals_that_of_transformers(folder, length):
  """Also for tokens beyond the original context: in both, cached keys keep their first rotation."""
  tokens_BT, theirs, model = tokens(length + 6), torch_model(folder), model_of(folder)
  whole = torch.tensor(tokens_BT, dtype=torch.int64)
  with torch.no_grad(), jax.default_matmul_precision('highest'):
    first = theirs(whole[:, :length], use_cache=True)
    padded = np.pad(tokens_BT[:, :length], ((0, 0), (0, 7)))
    logit_BV, cache = prefill(model, jnp.asarray(padded), jnp.full(2, length, jnp.int32), 64)
    expected, got, past = [first.logits[:, -1]], [logit_BV], first.past_key_values
    for t in range(length, length + 6):
      step = theirs(whole[:, t : t + 1], past_key_values=past, use_cache=True)
      expected.append(step.logits[:, -1])
      logit_BV, cache = decode_step(model, cache, jnp.asarray(tokens_BT[:, t]), jnp.full(2, t, jnp.int32))
      got.append(logit_BV)
  expected = torch.stack(expected).numpy()
  np.testing.assert_allclose(np.stack(got), expected, atol=1e-5 * max(1.0, float(expected.std())))


def test_the_scaling_changes_the_frequencies(folder):
  """So the tests above can fail."""
  model = model_of(folder)
  if CASES['llama, dynamic'].items() <= json.loads((folder / 'config.json').read_text())['rope_parameters'].items():
    assert model.spec.rope_until == 64
    return
  plain = open_source(str(folder), folder).config
  plain = plain | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0}}
  spec, _ = open_source(str(folder), folder).family.spec_from_config(plain)
  assert spec.rope_freq_RH != model.spec.rope_freq_RH and model.spec.rope_scale_R[0] > 1


def test_dynamic_scaling_limits_the_length(folder):
  source = open_source(str(folder), folder)
  texts = _Texts(None, source, None)
  if not source.spec.rope_until:
    texts._check_length('seq_len', 1000)
    return
  texts._check_length('seq_len', 64)
  with pytest.raises(InputError, match='seq_len=65: the model has only 64 positions; use at most that many'):
    texts._check_length('seq_len', 65)


@pytest.mark.parametrize(
  ('rope', 'sentence'),
  [
    (LONG | dict(long_factor=[1.0, 2.0]), 'rope scaling long_factor must be a list of 4 numbers'),
    (LONG | dict(short_factor=[1.0, 2.0, 0, 1]), 'short_factor=0 must be a number above 0'),
    (YARN | dict(factor=0), 'factor=0 must be a number above 0'),
    (YARN | dict(beta=1), "rope scaling key 'beta' is not known for rope type 'yarn'"),
    (
      dict(rope_type='proportional'),
      "rope type 'proportional' is not supported; use a checkpoint with default, linear, .* or longrope.",
    ),
  ],
)
def test_an_invalid_scaling_is_named(rope, sentence):
  from elder_jax.hf.families import llama

  config = SIZES | dict(model_type='llama', rms_norm_eps=1e-5, rope_parameters=rope)
  with pytest.raises(InputError, match=sentence):
    llama.spec_from_config({k: v for k, v in config.items() if k != 'initializer_range'})
