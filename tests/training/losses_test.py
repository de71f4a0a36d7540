"""The loss against the plain formula, and that it never holds the logits of a whole batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from plain_forward import SPEC
from plain_forward import B
from plain_forward import T
from plain_forward import alive_without
from plain_forward import by_hand
from plain_forward import decoder
from plain_forward import tokens
from plain_forward import with_gates
import pytest

from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.run.plan import compile as plan
from elder_jax.training import losses


def plain_nll(model, x_BTD, tokens_BT, weight_BT=None):
  logp_BTV = jax.nn.log_softmax(logits_of(model, x_BTD), -1)
  nll_BT = -jnp.take_along_axis(logp_BTV[:, :-1], jnp.array(tokens_BT)[:, 1:, None], -1)[..., 0]
  weight_BT = jnp.ones(tokens_BT.shape) if weight_BT is None else weight_BT
  return jnp.sum(nll_BT * weight_BT[:, :-1]), jnp.sum(weight_BT[:, :-1])


@pytest.mark.parametrize('weighted, tied', [(True, False), (False, True)])
@pytest.mark.parametrize('length', [2, 4, 11])  # a chunk is 8 tokens: 4 of each of 2 rows
def test_next_token_nll_equals_the_plain_formula(length, weighted, tied, monkeypatch):
  monkeypatch.setitem(losses.CHUNK_TOKENS, 'cpu', 8)
  model, tokens_BT = decoder(tied=tied), tokens(B, length)
  x_BTD = jax.random.normal(jax.random.key(5), (B, length, SPEC.d_model))
  weight_BT = jnp.array(np.random.default_rng(1).integers(0, 2, (B, length)), jnp.float32) if weighted else None
  if weighted:
    weight_BT = weight_BT.at[0, 0].set(0.5)

  def value_and_grad(f):
    return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(model, x_BTD, tokens_BT, weight_BT)

  (total, count), gradients = value_and_grad(losses.next_token_nll)
  (plain_total, plain_count), plain_gradients = value_and_grad(plain_nll)
  assert count == plain_count and count > 0
  np.testing.assert_allclose(total, plain_total, rtol=1e-6)
  chex.assert_trees_all_close(gradients, plain_gradients, rtol=1e-4, atol=1e-5)
  used = gradients[0].embed if tied else gradients[0].head
  assert np.abs(used[...]).max() > 1e-2 and np.abs(gradients[1]).max() > 1e-2


@pytest.mark.parametrize('distill', [0.0, 0.3])
def test_the_gradient_is_the_same_with_a_frozen_head(distill, monkeypatch):
  """With a frozen head it is computed in the forward pass, else in the backward pass; both equal the plain formula."""
  monkeypatch.setitem(losses.CHUNK_TOKENS, 'cpu', 8)
  model, teacher, tokens_BT = decoder(), decoder(tied=True), tokens()
  x_BTD, y_BTD = jax.random.normal(jax.random.key(5), (2, B, T, SPEC.d_model))

  def minimised(model, x_BTD):
    total, _, _, count = losses._token_sums(model, x_BTD, tokens_BT, teacher=(teacher, y_BTD), distill=distill)
    return 3 * total / count

  def plain(x_BTD):
    logp_BTV, teacher_BTV = (jax.nn.log_softmax(logits_of(*a)[:, :-1]) for a in ((model, x_BTD), (teacher, y_BTD)))
    kl_BT = jnp.sum(jnp.exp(teacher_BTV) * (teacher_BTV - logp_BTV), -1)
    nll, count = plain_nll(model, x_BTD, tokens_BT)
    return 3 * ((1 - distill) * nll / count + distill * jnp.mean(kl_BT))

  value, to_x = jax.jit(jax.value_and_grad(minimised, argnums=1))(model, x_BTD)
  value_by_both, (_, to_x_by_both) = jax.jit(jax.value_and_grad(minimised, argnums=(0, 1)))(model, x_BTD)
  plain_value, plain_to_x = jax.jit(jax.value_and_grad(plain))(x_BTD)
  np.testing.assert_allclose((value, value_by_both), plain_value, rtol=1e-5)
  for gradient in (to_x, to_x_by_both):
    np.testing.assert_allclose(gradient, plain_to_x, rtol=1e-4, atol=1e-7)
  assert np.abs(plain_to_x).max() > 1e-3


@pytest.mark.parametrize('temperature', [0.5, 3.0])
def test_temperature_equals_the_formula(temperature, monkeypatch):
  """With a trained and a frozen head, and token weights."""
  monkeypatch.setitem(losses.CHUNK_TOKENS, 'cpu', 8)
  model, teacher, tokens_BT = decoder(), decoder(tied=True), tokens()
  x_BTD, y_BTD = jax.random.normal(jax.random.key(5), (2, B, T, SPEC.d_model))
  weight_BT = jnp.array(np.random.default_rng(1).integers(0, 2, (B, T)), jnp.float32)

  def minimised(model, x_BTD):
    total, _, kl, count = losses._token_sums(
      model, x_BTD, tokens_BT, weight_BT, (teacher, y_BTD), jnp.float32(0.3), temperature
    )
    return total / count, kl / count

  def plain(model, x_BTD):
    q_BTV, p_BTV = (jax.nn.softmax(logits_of(*a)[:, :-1] / temperature) for a in ((model, x_BTD), (teacher, y_BTD)))
    kl_BT = jnp.sum(p_BTV * jnp.log(p_BTV / q_BTV), -1)
    nll, count = plain_nll(model, x_BTD, tokens_BT, weight_BT)
    kl = temperature**2 * jnp.sum(kl_BT * weight_BT[:, :-1]) / count
    return 0.7 * nll / count + 0.3 * kl, kl

  def both(f):
    one = jax.jit(jax.value_and_grad(f, argnums=1, has_aux=True))(model, x_BTD)
    two = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(model, x_BTD)
    return one, two

  chex.assert_trees_all_close(both(minimised), both(plain), rtol=1e-4, atol=1e-6)
  _, kl = minimised(model, x_BTD)
  _, plain_kl = plain(model, x_BTD)
  assert kl > 0.1
  np.testing.assert_allclose(kl, plain_kl, rtol=1e-5)


@pytest.mark.parametrize('trained, distill, products', [((0, 1), 0.0, 4), (1, 0.0, 2), (1, 0.5, 3)])
def test_number_of_products_with_the_head(trained, distill, products):
  x_BTD = jnp.ones((B, T, SPEC.d_model))
  teacher = (decoder(), x_BTD) if distill else None

  def total(m, x):
    return losses._token_sums(m, x, tokens(), teacher=teacher, distill=distill)[0]

  found = plan.traced_flops(jax.make_jaxpr(jax.grad(total, argnums=trained))(decoder(), x_BTD).jaxpr)
  assert found == products * 2 * B * T * SPEC.vocab_size * SPEC.d_model


def _subjaxprs(value):
  if isinstance(value, (list, tuple)):
    for v in value:
      yield from _subjaxprs(v)
  elif hasattr(value, 'eqns'):
    yield value
  elif hasattr(value, 'jaxpr'):
    yield from _subjaxprs(value.jaxpr)


def _arrays(jaxpr):
  """The abstract values of a jaxpr and of all jaxprs nested in it."""
  for eqn in jaxpr.eqns:
    for var in (*eqn.invars, *eqn.outvars):
      yield var.aval
    for value in eqn.params.values():
      for inner in _subjaxprs(value):
        yield from _arrays(inner)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_logits_of_a_whole_batch_are_never_in_memory(dtype, monkeypatch):
  monkeypatch.setitem(losses.CHUNK_TOKENS, 'cpu', 8)
  model, length = decoder(), 100
  x_BTD = jnp.ones((B, length, SPEC.d_model), dtype)

  def largest(f):
    def loss(m, x):
      return f(m, x, tokens(B, length))[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(model, x_BTD).jaxpr
    return max(a.size for a in _arrays(jaxpr) if hasattr(a, 'size'))

  V = SPEC.vocab_size
  weights = max(a.size for a in jax.tree.leaves(model))
  assert weights < B * length * V  # else the weights would be the largest
  assert B * 4 * V <= largest(losses.next_token_nll) < B * length * V
  assert largest(plain_nll) >= B * (length - 1) * V  # the search finds them where they exist


def test_loss_is_the_sum_of_its_parts():
  model = with_gates(decoder(), [0.9, -0.4, 0.3, 1.2, 0.7])
  terms = {
    'alive_L': alive_without(1),
    'gate_weight_L': jnp.array([0.1, 0, 0.2, 0, 0.3]),
    'delta_weight_L': jnp.array([0, 0, 0.5, 0.25, 0]),
  }
  mode = Mode(penalty_scale='relative')
  total, parts = losses.loss(model, tokens(), terms, mode)
  x_BTD, delta_L = by_hand(model, tokens(), np.asarray(terms['alive_L']), mode)
  nll, count = plain_nll(model, x_BTD, tokens())
  assert count == B * (T - 1)
  np.testing.assert_allclose(parts['lm_loss'], nll / count, rtol=1e-5)
  np.testing.assert_allclose(parts['gate_l1'], 0.1 * 0.9 + 0.2 * 0.3 + 0.3 * 0.7, rtol=1e-5)
  np.testing.assert_allclose(parts['penalty'], 0.5 * delta_L[2] + 0.25 * delta_L[3], rtol=1e-5)
  np.testing.assert_allclose(parts['delta_L'], delta_L, rtol=1e-5)
  np.testing.assert_allclose(total, parts['lm_loss'] + parts['gate_l1'] + parts['penalty'], rtol=1e-6)
