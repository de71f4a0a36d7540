"""Products and their gradients equal jnp.einsum's, and a bfloat16 step on a CPU has no product that is slow there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_step

from elder_jax.devices import sharding
from elder_jax.model import products

EQUATIONS = (
  ('BTD,DF->BTF', (2, 5, 6), (6, 7)),
  ('BTD,DNH->BTNH', (2, 5, 6), (6, 3, 4)),
  ('BTNH,NHD->BTD', (2, 5, 3, 4), (3, 4, 6)),
  ('BTD,VD->BTV', (2, 5, 6), (9, 6)),
  ('BTKGH,BSKH->BKGTS', (2, 5, 3, 2, 4), (2, 7, 3, 4)),
  ('BKGTS,BSKH->BTKGH', (2, 3, 2, 5, 7), (2, 7, 3, 4)),
)


@pytest.mark.parametrize('result', (jnp.float32, None))
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize('equation, x_shape, w_shape', EQUATIONS)
def test_equals_einsum(equation, x_shape, w_shape, dtype, result):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x_shape, w_shape))
  weight = jnp.asarray(rng.normal(size=jnp.einsum(equation, x, w).shape), jnp.float32)

  def total(product, x, w):
    y = product(x, w)
    return jnp.sum(y * weight), y

  def exact(x, w):
    return jnp.einsum(equation, x, w, precision='highest')

  def ours(x, w):
    return products.einsum(equation, x, w, result)

  (_, y), grads = jax.value_and_grad(total, (1, 2), has_aux=True)(ours, x, w)
  (_, exact_y), exact_grads = jax.value_and_grad(total, (1, 2), has_aux=True)(
    exact, x.astype(jnp.float32), w.astype(jnp.float32)
  )
  assert y.dtype == (result or dtype)
  assert [g.dtype for g in grads] == [dtype, dtype]
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  for got, wanted in zip((y, *grads), (exact_y, *exact_grads)):
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, tolerance, tolerance * np.abs(wanted).max())


@pytest.mark.parametrize('what', ('gates', 'all'))
def test_no_slow_product_in_a_bfloat16_step(what, monkeypatch):
  monkeypatch.setattr(sharding, 'platform', lambda: 'cpu')
  tiny_step.adam_step.cache_clear()  # what was traced for another platform
  step, state, frozen = tiny_step.begin(what, dtype='bfloat16')
  text = step.lower(state, (frozen, None), tiny_step.BATCHES_SBT[0], tiny_step.terms()).as_text()
  found = re.findall(r'dot_general.* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>', text)
  assert len(found) == text.count('stablehlo.dot_general')
  assert len(found) > 10
  assert set(found) == {('bf16', 'bf16', 'f32')}
