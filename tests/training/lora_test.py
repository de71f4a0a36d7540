"""LoRA: the factors, the gradient of their product, and merging."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import leaves
from tiny_lora import ALPHA
from tiny_lora import BATCHES_SBT
from tiny_lora import MATRICES
from tiny_lora import RANK
from tiny_lora import SPEC
from tiny_lora import L
from tiny_lora import random_model

from elder_jax.errors import InputError
from elder_jax.model import lora
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode

# Another kind of block: biases, LayerNorm, no gate in the MLP, attention and MLP in parallel.
PARALLEL = dataclasses.replace(
  SPEC,
  norm='layer',
  block='parallel',
  shared_norm=True,
  gated_mlp=False,
  activation='gelu',
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  head_bias=True,
  tied=False,
)


def moved(model: Decoder) -> Decoder:
  """`model` with LoRA and nonzero second factors, as after training."""
  model = lora.attach(model, RANK, ALPHA, 0)
  for i, name in enumerate(sorted(MATRICES)):
    if (matrix := getattr(model.layers, name)) is not None:
      b = matrix.b.get_value()
      matrix.b.set_value(0.1 * jax.random.normal(jax.random.key(i), b.shape))
  return model


@functools.partial(jax.jit, static_argnames='mode')
def logits(model: Decoder, mode: Mode = Mode()):
  return logits_of(model, forward(model, BATCHES_SBT[0], mode=mode)[0])


def test_factors_have_the_axes_of_their_matrix():
  made = lora.factors(random_model().layers, RANK, seed=0)
  assert set(made) == MATRICES
  axes = {name: tuple(ab[k].get_metadata()['axes'] for k in 'ab') for name, ab in made.items()}
  assert axes['wq'] == ('LDr', 'LrNH') and axes['wk'] == axes['wv'] == ('LDr', 'LrKH')
  assert axes['wo'] == ('LNHr', 'LrD') and axes['w_down'] == ('LFr', 'LrD')
  assert axes['w_gate'] == axes['w_up'] == ('LDr', 'LrF')
  sizes = SPEC.sizes(L) | {'r': RANK}
  for ab in made.values():
    for param in ab.values():
      assert param.get_value().shape == tuple(sizes[x] for x in param.get_metadata()['axes'])
      assert param.get_value().dtype == jnp.float32
    assert not ab['b'].get_value().any()

  def a(seed, name):
    return np.array(lora.factors(random_model().layers, 16, seed)[name]['a'].get_value())

  np.testing.assert_allclose(a(0, 'w_down').std(), 24**-0.5, rtol=0.1)
  np.testing.assert_allclose(a(0, 'wo').std(), 16**-0.5, rtol=0.1)
  assert np.array_equal(a(0, 'wq'), a(0, 'wq')) and not np.isclose(a(0, 'wq'), a(1, 'wq')).any()
  assert not np.isclose(a(0, 'w_gate'), a(0, 'w_up')).any()


def test_new_factors_do_not_change_the_model():
  chex.assert_trees_all_close(logits(lora.attach(random_model(), RANK, ALPHA, 0)), logits(random_model()), atol=1e-6)


@pytest.mark.parametrize('spec', [SPEC, PARALLEL], ids=['llama', 'parallel'])
def test_the_merged_model_equals_the_unmerged_one(spec):
  model = moved(random_model(spec))
  merged = lora.merge(model)
  assert jax.tree.structure(merged) == jax.tree.structure(random_model(spec))
  before, after = np.asarray(logits(model)), np.asarray(logits(merged))
  np.testing.assert_allclose(after, before, atol=1e-5)
  assert np.abs(after - np.asarray(logits(random_model(spec)))).max() > 0.1
  old, new, factor = leaves(random_model(spec)), leaves(merged), leaves(model)
  for name in old:
    short = name.removeprefix('.layers.').removesuffix('.value')
    if short not in MATRICES:
      np.testing.assert_array_equal(new[name], old[name])
      continue
    a, b = (factor[f'.layers.{short}.{k}.value'].astype(np.float64) for k in 'ab')
    change_LIO = np.matmul(a.reshape(L, -1, RANK), b.reshape(L, RANK, -1))
    np.testing.assert_allclose(new[name], old[name] + ALPHA / RANK * change_LIO.reshape(old[name].shape), atol=1e-6)


@pytest.mark.parametrize('equation', ['BTD,DNH->BTNH', 'BTNH,NHD->BTD', 'BTD,DF->BTF', 'BTF,FD->BTD'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gradient_of_a_product_equals_the_formula(equation, dtype):
  sizes = {'B': 2, 'T': 5, 'D': 8, 'N': 2, 'H': 3, 'F': 7, 'r': 2}
  x_axes, w_axes, y_axes = equation.replace('->', ',').split(',')
  outer = y_axes[2:]
  inner = x_axes[2:]
  keys = iter(jax.random.split(jax.random.key(0), 5))

  def make(axes):
    return jax.random.normal(next(keys), [sizes[s] for s in axes])

  x, w = make(x_axes).astype(dtype), make(w_axes).astype(dtype)
  a, b, dy = make(inner + 'r'), make('r' + outer), make(y_axes)

  def plain(x, a, b):
    change = jnp.einsum(f'{inner}r,r{outer}->{w_axes}', a, b)
    return jnp.sum(dy * jnp.einsum(equation, x.astype(jnp.float32), w.astype(jnp.float32) + 0.5 * change))

  def mine(x, a, b):
    return jnp.sum(dy * lora.product(equation, 0.5, x, w, a, b))

  tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == 'float32' else dict(rtol=0.03, atol=0.15)
  x32 = x.astype(jnp.float32)
  np.testing.assert_allclose(mine(x, a, b), plain(x32, a, b), rtol=1e-5 if dtype == 'float32' else 0.02)
  for got, wanted, like in zip(jax.grad(mine, (0, 1, 2))(x, a, b), jax.grad(plain, (0, 1, 2))(x32, a, b), (x, a, b)):
    assert got.dtype == like.dtype and np.abs(wanted).max() > 1
    np.testing.assert_allclose(np.float32(got), wanted, **tolerance)
  assert not np.any(jax.grad(lambda w: jnp.sum(lora.product(equation, 0.5, x, w, a, b)))(w))  # frozen


def test_rank_above_the_smallest_side_is_refused():
  abstract = jax.eval_shape(random_model)
  lora.check(abstract, 8)  # wk makes K·H = 8
  with pytest.raises(InputError, match='^lora_rank=9: .* is 8; give at most that'):
    lora.check(abstract, 9)
