"""The network against transformers, causality, independence of batch rows, and dtypes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import SPEC
from plain_forward import B
from plain_forward import T
from plain_forward import decoder
from plain_forward import forward_jit
from plain_forward import tokens
from plain_forward import with_gates
import pytest
from tiny import write_tiny_llama

from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0}
TORCH_CASES = {
  'mha_untied': dict(num_key_value_heads=4, tie_word_embeddings=False),
  'gqa_tied': dict(num_key_value_heads=2),
  'mqa_untied': dict(num_key_value_heads=1, tie_word_embeddings=False),
  'wide_heads_tied': dict(head_dim=12, vocab_size=101),
  'narrow_heads_untied': dict(head_dim=6, tie_word_embeddings=False, vocab_size=101),
  'theta': dict(rope_parameters={'rope_type': 'default', 'rope_theta': 100.0}),
  'llama3_rope': dict(rope_parameters=LLAMA3),
  'linear_rope': dict(rope_parameters=LINEAR),
}


@pytest.mark.parametrize('config', TORCH_CASES.values(), ids=TORCH_CASES)
def test_logits_equal_those_of_transformers(config, tmp_path):
  import torch
  import transformers

  folder = write_tiny_llama(tmp_path, initializer_range=0.1, **config)
  source = open_source(str(folder), tmp_path / 'scratch')
  model = load_model(source, 'float32')
  assert model.spec.tied == ('tie_word_embeddings' not in config) and (model.head is None) == model.spec.tied
  tokens_BT = tokens(2, 40, source.spec.vocab_size)
  reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with torch.no_grad():
    expected_BTV = reference(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
  _, _, logits_BTV = forward_jit(model, tokens_BT)
  chex.assert_shape(logits_BTV, (2, 40, source.spec.vocab_size))
  chex.assert_type(logits_BTV, jnp.float32)
  assert np.std(expected_BTV) > 0.1
  np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=1e-5)
  # The setting must matter at this length: with default RoPE the logits differ.
  if 'rope_parameters' in config:
    H = source.spec.head_dim
    default_H = tuple(float(10000.0 ** (-i / H)) for i in range(0, H, 2))
    other = forward_jit(_with_spec(model, rope_freq_RH=(default_H,)), tokens_BT)[2]
    assert np.max(np.abs(other - expected_BTV)) > 1e-2


def _with_spec(model: Decoder, **changes) -> Decoder:
  other = jax.tree.map(lambda a: a, model)
  other.spec = dataclasses.replace(model.spec, **changes)
  return other


@pytest.mark.parametrize('gate', ['residual', 'output'])
@pytest.mark.parametrize('t', [0, 5, T - 1])
def test_causality(t, gate):
  model, mode = with_gates(decoder(), [0.7, 1.3, 0.2, 1.0, -0.4]), Mode(gate=gate)
  before, after = tokens(), tokens()
  after[:, t] = (after[:, t] + 1) % SPEC.vocab_size
  a, b = (np.asarray(forward_jit(model, x, mode=mode)[2]) for x in (before, after))
  np.testing.assert_array_equal(a[:, :t], b[:, :t])
  assert np.all(np.max(np.abs(a - b), -1)[:, t:] > 1e-6)  # every later token depends on it


def test_rows_of_a_batch_are_independent():
  both = forward_jit(decoder(), tokens())[2]
  for b in range(B):
    np.testing.assert_allclose(forward_jit(decoder(), tokens()[b : b + 1])[2][0], both[b], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32():
  model, half = decoder(), Mode(dtype='bfloat16')
  x_BTD, delta_L, logits_BTV = forward_jit(model, tokens(), mode=half)
  assert (x_BTD.dtype, delta_L.dtype, logits_BTV.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  exact_BTD, exact_L, exact_BTV = forward_jit(model, tokens())
  np.testing.assert_allclose(logits_BTV, exact_BTV, atol=0.15)
  np.testing.assert_allclose(delta_L, exact_L, rtol=0.03)
  # Weights stored in bfloat16 give the same result as float32 weights that are rounded on use.
  stored = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
  stored.gate_L.set_value(model.gate_L[...])
  np.testing.assert_array_equal(forward_jit(stored, tokens(), mode=half)[2], logits_BTV)
