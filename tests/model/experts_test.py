"""Mixture of experts: against plain NumPy, on a mesh, with LoRA, and with absorb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import on_one_and_eight
from tiny import tiny_decoder

from elder_jax.model import experts
from elder_jax.model import lora
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb
from elder_jax.training.losses import next_token_nll

FEW = dict(experts=4, experts_per_token=2)
KINDS = {
  'chosen': FEW,
  'all': FEW | dict(router='all'),
  'biases': FEW | dict(router_bias=True, mlp_bias=True, sinks=True, glu_limit=0.3, glu_alpha=1.7),
  'one': dict(experts=4, experts_per_token=1, gated_mlp=False),
}
TOKENS = np.random.default_rng(0).integers(0, 40, (8, 12), np.int32)


def mixed(**features):
  """A small decoder with experts and with random biases and sinks."""
  model = tiny_decoder(4, **features)
  for i, name in enumerate(('router_bias', 'b_gate', 'b_up', 'b_down', 'sinks')):
    if (param := getattr(model.layers, name)) is not None:
      param.set_value(jax.random.normal(jax.random.key(i), param.get_value().shape))
  return model


@pytest.mark.parametrize('kind', KINDS)
def test_the_sum_over_a_tokens_experts(kind):
  model, spec = mixed(**KINDS[kind]), mixed(**KINDS[kind]).spec
  block = jax.tree.map(lambda a: a[1], model.layers)
  h = np.random.default_rng(1).normal(size=(2, 5, 16))
  names = 'router router_bias w_gate w_up w_down b_gate b_up b_down'.split()
  at = {name: None if (p := getattr(block, name)) is None else np.asarray(p[...], np.float64) for name in names}
  score = h @ at['router'] + (0 if at['router_bias'] is None else at['router_bias'])
  expected = np.zeros_like(h)
  for place in np.ndindex(2, 5):
    best = np.argsort(-score[place])[: spec.experts_per_token]
    over = best if spec.router == 'chosen' else range(4)
    share = np.exp(score[place]) / np.exp(score[place][list(over)]).sum()
    for e in best:
      w = {name: 0 if a is None else a[e] for name, a in at.items() if name[1] == '_'}
      up = h[place] @ w['w_up'] + w['b_up']
      gate = h[place] @ w['w_gate'] + w['b_gate'] if spec.gated_mlp else up
      if spec.glu_limit:
        gate = np.minimum(gate, 0.3)
        f = gate / (1 + np.exp(-1.7 * gate)) * (np.clip(up, -0.3, 0.3) + 1)
      else:
        f = gate / (1 + np.exp(-gate)) * (up if spec.gated_mlp else 1)
      expected[place] += share[e] * (f @ w['w_down'] + w['b_down'])
  np.testing.assert_allclose(block._mixture(jnp.asarray(h, jnp.float32)), expected, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_a_mesh_computes_the_same_as_one_device(kind):
  """Experts, tokens and width are sharded. A batch that cannot be divided is not."""
  model = mixed(**KINDS[kind])

  def run(model, batches):
    def loss(model, tokens_BT):
      x_BTD, _ = forward(model, tokens_BT)
      return next_token_nll(model, x_BTD, tokens_BT)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(model, batches[0])
    three = jax.jit(lambda model: logits_of(model, forward(model, TOKENS[:3])[0]))(model)
    return jax.tree.map(np.asarray, (value, jax.tree.leaves(gradients), three))

  one, eight = on_one_and_eight(model, [TOKENS], jax.devices(), run)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight)):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(a).max()))


def test_rows_of_experts_are_not_swapped():
  """Each expert outputs its own number, so a token's sum shows which experts it used."""
  spec = mixed(**FEW).spec
  weights = dict(w_gate=None, w_up=jnp.zeros((4, 16, 24)), w_down=jnp.zeros((4, 24, 16)), b_gate=None, b_up=None)
  weights['b_down'] = jnp.tile(jnp.arange(4.0)[:, None], 16)
  expert_BTk = jnp.array([[[0, 3], [2, 1], [3, 2]]])
  share_BTk = jnp.array([[[1.0, 0.5], [0.25, 1.0], [0.0, 2.0]]])
  out_BTD = experts.mixture(spec, jnp.ones((1, 3, 16)), expert_BTk, share_BTk, weights, lambda gate, up: up)
  np.testing.assert_allclose(out_BTD[0, :, 0], [1.5, 1.5, 4.0])


def test_lora_does_not_wrap_experts():
  model = mixed(**FEW)
  wrapped = lora.attach(model, 2, 4.0, 0)
  assert isinstance(wrapped.layers.wq, lora.Lora) and not isinstance(wrapped.layers.w_up, lora.Lora)
  np.testing.assert_array_equal(forward(lora.merge(wrapped), TOKENS)[0], forward(model, TOKENS)[0])


@pytest.mark.parametrize('kind', KINDS)
def test_absorb_applies_the_same_change_to_all_experts_and_lowers_the_error(kind):
  model, reports = mixed(**KINDS[kind]), []
  result = absorb.absorb(model, [2], [TOKENS], Mode(), lambda *about: reports.append(about), after=0)
  ((layer, end, before, after),) = reports
  assert (layer, end) == (1, 3) and after < 0.9 * before
  w, new = (np.asarray(m.layers.w_down[...][1], np.float64) for m in (model, result))
  maps = [np.linalg.lstsq(w[e], new[e], rcond=None)[0] for e in range(4)]
  for change in maps[1:]:
    np.testing.assert_allclose(change, maps[0], atol=1e-4)
