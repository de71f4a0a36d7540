"""Sums over the text: nearly exact in float32, sharded on the devices, and read by parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.recipes import sums


def test_a_total_of_many_batches_keeps_what_float32_would_lose():
  random = np.random.default_rng(0)
  parts = [np.float32(random.normal(size=(4, 3))) * np.float32(10.0 ** (i % 5)) for i in range(200)]
  total = None
  for part in parts:
    total = sums.add(total, (jnp.asarray(part),))
  (found,) = sums.on_host(total)
  expected = np.sum([p.astype(np.float64) for p in parts], 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert np.abs(np.sum(parts, 0) - expected).max() > 1e-6  # plain float32 loses it


@pytest.mark.parametrize('rows, held', [(16, 2), (12, 12)])
def test_each_device_holds_some_rows_of_a_matrix(rows, held):
  with jax.set_mesh(sharding.make_mesh((2, 2, 2), jax.devices()[:8])):
    spread = jax.jit(sums.spread)((jnp.ones((rows, 4)), jnp.ones(4), jnp.ones(())))
    total = sums.add(sums.add(None, spread), spread)
    for a in jax.tree.leaves(total):
      assert a.addressable_shards[0].data.shape == ((held, 4) if a.ndim == 2 else a.shape)
    assert sums.total_device_bytes(spread, 8) == 2 * 4 * (held * 4 + 4 + 1)
    for found, expected in zip(sums.on_host(total), spread, strict=True):
      np.testing.assert_array_equal(found, 2 * np.asarray(expected))


@pytest.mark.parametrize('part', [1, 100, 2**20])
@pytest.mark.parametrize('spec', [('data', None), (None, 'data'), (('data', 'fsdp'),), ()])
def test_an_array_of_all_processes_is_read_by_parts(spec, part, monkeypatch):
  monkeypatch.setattr(hosts, 'PART', part)
  mesh = sharding.make_mesh((2, 2, 1), jax.devices()[:4])
  whole = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
  there = jax.device_put(whole, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
  np.testing.assert_array_equal(hosts._in_parts(there), whole)


def test_ridge_penalises_each_group_by_its_own_mean_and_keeps_its_input():
  random = np.random.default_rng(0)
  a = random.normal(size=(50, 5)) * [1, 1, 10, 10, 10]
  gram, cross = a.T @ a, random.normal(size=(5, 2))
  before, diagonal = gram.copy(), np.diag(gram)
  penalty = 0.3 * np.repeat([diagonal[:2].mean(), diagonal[2:].mean()], [2, 3])
  expected = np.linalg.solve(gram + np.diag(penalty), cross)
  np.testing.assert_allclose(sums.ridge(gram, cross, 0.3, (2, 3)), expected, rtol=1e-10)
  np.testing.assert_array_equal(gram, before)
