"""Attention: blocks of queries, grouped key/value heads, and cuDNN on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import B
import pytest

from elder_jax.model import attention as attention_lib
from elder_jax.model import decoder as model_lib
from elder_jax.model.attention import QUERY_BLOCK
from elder_jax.model.attention import attention


@pytest.mark.parametrize(
  'dtype, head_dim, expected',
  [('bfloat16', 64, 'cudnn'), ('bfloat16', 6, 'xla'), ('bfloat16', 256, 'xla'), ('float32', 64, 'xla')],
)
def test_on_a_gpu_cudnn_is_used_where_it_supports_the_inputs(dtype, head_dim, expected, monkeypatch):
  asked = []
  monkeypatch.setattr(model_lib.sharding, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *_, implementation, **__: asked.append(implementation))
  attention(*[jnp.zeros((1, 4, 2, head_dim), dtype)] * 3)
  assert asked == [expected]


def test_on_a_gpu_each_window_of_a_models_layers_has_its_own_kernel(monkeypatch):
  asked = []

  def fused(q, *_, local_window_size, **__):
    asked.append(local_window_size)
    return q

  monkeypatch.setattr(model_lib.sharding, 'platform', lambda: 'gpu')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', fused)
  arrays = [jnp.zeros((1, 16, 2, 64), jnp.bfloat16)] * 3
  jax.jit(lambda w: attention(*arrays, w, window_L=(4, 0, 4)))(jnp.int32(4))
  assert asked == [(3, 0), None]


@pytest.mark.parametrize('length, kv_heads', [(5, 2), (8, 2), (16, 4), (21, 1)])
def test_blocks_of_queries_equal_full_attention(length, kv_heads, monkeypatch):
  monkeypatch.setitem(QUERY_BLOCK, 'cpu', 8)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')
  random = np.random.default_rng(0)
  q, k, v = (jnp.array(random.normal(size=(B, length, n, 6)), jnp.float32) for n in (4, kv_heads, kv_heads))
  expected = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
  squares, whole = [], attention_lib.masked_attention

  def noted(q, k, v, *how):
    squares.append((q.shape[1], k.shape[1]))
    return whole(q, k, v, *how)

  monkeypatch.setattr(attention_lib, 'masked_attention', noted)
  np.testing.assert_allclose(jax.jit(attention)(q, k, v), expected, rtol=1e-5, atol=1e-6)
  ends = [*range(8, length, 8), length]
  assert squares == [(end - start, end) for start, end in zip([0, *ends], ends)]


def test_query_head_reads_its_own_key_value_head():
  """Query head n reads key/value head n // (N/K), like Hugging Face's repeat_kv."""
  random = np.random.default_rng(0)
  q, k, v = (jnp.array(random.normal(size=(B, 7, n, 6)), jnp.float32) for n in (4, 2, 2))
  repeated = (jnp.array(np.repeat(a, 2, axis=2)) for a in (k, v))
  np.testing.assert_allclose(jax.jit(attention)(q, k, v), jax.jit(attention)(q, *repeated), rtol=1e-5, atol=1e-6)
