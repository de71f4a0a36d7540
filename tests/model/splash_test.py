"""Splash attention, the kernel for TPUs, step by step on a CPU: it equals attention without a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elder_jax.devices import sharding
from elder_jax.model import attention as attention_lib
from elder_jax.model import splash

CASES = {
  'grouped heads': dict(),
  'one head of keys, a cap': dict(kv_heads=1, head_dim=128, cap=5.0),
  'a window of the whole text, sinks': dict(window=256, sinks=True),
  'all at once': dict(window=37, cap=5.0, scale=0.3, sinks=True),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
  monkeypatch.setattr(splash, 'BLOCKS', (128,))


def inputs(heads=4, kv_heads=2, head_dim=64, sinks=False, batch=1, **how):
  random = np.random.default_rng(0)
  shapes = [(batch, 256, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(heads,)] * sinks
  return [jnp.array(random.normal(size=shape), jnp.float32) for shape in shapes], how


def of(function, how):
  """The output and the gradients of a function of it."""

  def total(q, k, v, sink=None):
    out = function(q, k, v, sink_N=sink, **how)
    return jnp.sum(jnp.sin(out)), out

  def both(*arrays):
    gradients, out = jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    return out, *gradients

  return jax.jit(both)


@pytest.mark.parametrize('case', CASES)
def test_equals_attention_without_a_kernel(case):
  arrays, how = inputs(**CASES[case])
  found, expected = of(splash.attention, how | dict(interpret=True))(*arrays), of(attention_lib.attention, how)(*arrays)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('sizes, batch', [((1, 2, 2), 2), ((2, 2, 1), 1)])
def test_runs_on_each_devices_own_rows_and_heads(sizes, batch):
  """A batch of one is not divided over the devices."""
  arrays, how = inputs(batch=batch, sinks=True)
  expected = of(attention_lib.attention, how)(*arrays)
  with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:4])):
    found = of(splash.attention, how | dict(interpret=True))(*arrays)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('window, expected', [(64, 64), (0, 256), (700, 256)])
def test_layers_with_different_windows_each_run_the_kernel_of_their_window(window, expected, monkeypatch):
  arrays, _ = inputs()
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  monkeypatch.setattr(splash, 'attention', lambda q, k, v, window, *_: jnp.full(q.shape, window, q.dtype))
  traced = jnp.int32(window or attention_lib.NO_WINDOW)
  found = jax.jit(lambda w: attention_lib.attention(*arrays, w, window_L=(64, 0, 700)))(traced)
  assert (found == expected).all()


@pytest.mark.parametrize('tokens, head_dim', [(250, 64), (256, 80)])
def test_other_sizes_run_without_the_kernel(tokens, head_dim, monkeypatch):
  arrays = [jnp.ones((1, tokens, 2, head_dim))] * 3
  monkeypatch.setattr(sharding, 'platform', lambda: 'tpu')
  monkeypatch.setattr(splash, 'attention', lambda *_: pytest.fail('not a size of the kernel'))
  attention_lib.attention(*arrays)
