"""The norm of a layer's update and its gradient, against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import ALL_NORMS
from plain_forward import B
from plain_forward import T
from plain_forward import plain_norm
import pytest

from elder_jax.training.penalty import delta_norm


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_equals_numpy(penalty, scale):
  d_BTD, x_BTD = np.random.default_rng(3).normal(size=(2, B, T, 8)).astype(np.float32)
  got = delta_norm(jnp.array(d_BTD), jnp.array(x_BTD), penalty, scale)
  chex.assert_shape(got, ())
  chex.assert_type(got, jnp.float32)
  np.testing.assert_allclose(got, plain_norm(d_BTD, x_BTD, penalty, scale), rtol=1e-5)
  half = delta_norm(jnp.array(d_BTD, jnp.bfloat16), jnp.array(x_BTD, jnp.bfloat16), penalty, scale)
  chex.assert_type(half, jnp.float32)


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_at_zero(penalty, scale):
  x_BTD = jnp.array(np.random.default_rng(3).normal(size=(B, T, 8)), jnp.float32)
  value, gradient = jax.value_and_grad(delta_norm)(jnp.zeros_like(x_BTD), x_BTD, penalty, scale)
  assert value == 0
  np.testing.assert_array_equal(gradient, 0)
  # One token is zero and others are not; x, which `relative` divides by, is zero.
  some = x_BTD.at[0, 3].set(0)
  _, gradients = jax.value_and_grad(delta_norm, (0, 1))(some, jnp.zeros_like(x_BTD), penalty, scale)
  chex.assert_tree_all_finite(gradients)
  np.testing.assert_array_equal(gradients[0][0, 3], 0)
  assert np.all(np.abs(gradients[0][1]) > 0)


@pytest.mark.parametrize('penalty, scale', ALL_NORMS)
def test_delta_norm_gradient(penalty, scale):
  d_BTD, x_BTD = np.random.default_rng(3).normal(size=(2, B, T, 8)).astype(np.float32)
  to_d, to_x = jax.grad(delta_norm, (0, 1))(jnp.array(d_BTD), jnp.array(x_BTD), penalty, scale)
  axis = None if scale == 'none' else -1
  order = {'l1': 1, 'l2': 2}[penalty]
  direction = np.sign(d_BTD)
  if penalty == 'l2':
    direction = d_BTD / np.sqrt(np.sum(d_BTD**2, axis=axis, keepdims=True))
  size = np.linalg.norm(x_BTD, order, axis=-1, keepdims=True) if scale == 'relative' else 1.0
  np.testing.assert_allclose(to_d, direction / size / (1 if scale == 'none' else B * T), rtol=1e-5)
  np.testing.assert_array_equal(to_x, 0)  # the denominator of `relative` is a constant
