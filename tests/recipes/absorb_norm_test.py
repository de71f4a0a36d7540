"""absorb for blocks with a norm after the MLP, as in Gemma, against plain NumPy."""

from absorption import BATCHES
from absorption import ONE_MATRIX
from absorption import L
from absorption import features
from absorption import streams
from absorption import w_down
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_decoder

from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes import RECIPES
from elder_jax.recipes import absorb
from elder_jax.recipes import normed


def gemma_like() -> Decoder:
  """A model with Gemma's kind of block. The channels of the MLP's update differ in size, and one has the other sign."""
  model = tiny_decoder(norm='rms1', block='sandwich')
  scale_LD = 0.3 * np.random.default_rng(1).normal(size=(L, 16)) + np.geomspace(0.1, 3, 16) - 1
  scale_LD[:, 3] -= 2
  model.layers.post_mlp_norm.scale.set_value(jnp.array(scale_LD, jnp.float32))
  return model


def normed_parts(model, removed, l, end):
  """Returns f, r, the update of the MLP of layer l in the dense model, and 1 / ‖target‖², for all tokens."""
  features_SF, wanted_SD, targets_SD, added_SD = [], [], [], []
  scale_D = 1 + np.asarray(model.layers.post_mlp_norm.scale[...][l], np.float64)
  for tokens_BT in BATCHES:
    x_MSD = streams(model, tokens_BT)
    f_SF = features(model, l, tokens_BT)
    y_SD = scale_D * unit(f_SF @ w_down(model, l))
    features_SF.append(f_SF)
    added_SD.append(y_SD)
    wanted_SD.append(x_MSD[end] - (x_MSD[l + 1] - y_SD))
    targets_SD.append(x_MSD[end])
  f, r, t, y = map(np.concatenate, (features_SF, wanted_SD, targets_SD, added_SD))
  return f, r, y, 1 / (t * t).sum(1, keepdims=True)


def unit(u_SD):
  return u_SD / np.sqrt((u_SD**2).mean(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize('removed, l', [([2, 3], 1), ([5], 4)])
def test_the_refit_equals_the_formula_and_changes_nothing_else(removed, l):
  model, seen = gemma_like(), []
  pruned = ONE_MATRIX(model, removed, BATCHES, Mode(), lambda *a: seen.append(a))
  f, r, y, w = normed_parts(model, removed, l, max(removed) + 1)
  scale = 1 + np.asarray(model.layers.post_mlp_norm.scale[...][l], np.float64)
  first = slice(0, BATCHES[0].size)  # a quarter of three batches, rounded up to one
  kappa = np.sqrt((w * r * r)[first].sum(0) / w[first].sum())
  W = w_down(model, l) * (scale / kappa)
  for part in (first, slice(None)):
    u = f[part] @ W
    g = f[part] / np.sqrt((u * u).mean(1, keepdims=True) + 1e-5)
    gram = (w[part] * g).T @ g
    ridge = normed.RIDGE * gram.trace() / 24 * np.eye(24)
    W = W + np.linalg.solve(gram + ridge, (w[part] * g).T @ (r[part] / kappa - unit(u)))
  n = unit(f @ W)
  s = (w * r * n).sum(0) / (w * n * n).sum(0)
  place = pruning.kept_layers(L, removed).index(l)
  np.testing.assert_allclose(w_down(pruned, place), W, atol=2e-3 * np.abs(W).max())
  np.testing.assert_allclose(1 + pruned.layers.post_mlp_norm.scale[...][place], s, atol=2e-3 * np.abs(s).max())
  tokens = len(f)
  assert seen[0][:2] == (l, max(removed) + 1)
  np.testing.assert_allclose(seen[0][2], (w * (y - r) ** 2)[first].sum() / BATCHES[0].size, rtol=1e-3)
  np.testing.assert_allclose(seen[0][3], (w * (s * n - r) ** 2).sum() / tokens, rtol=1e-2)
  assert seen[0][3] < 0.8 * seen[0][2]

  expected = pruning.prune(model, removed)
  for weight in (lambda m: m.layers.w_down, lambda m: m.layers.post_mlp_norm.scale):
    same = weight(expected).get_value()
    weight(expected).set_value(same.at[place].set(weight(pruned).get_value()[place]))
  jax.tree.map(np.testing.assert_array_equal, pruned, expected)
  jax.tree.map(np.testing.assert_array_equal, model, gemma_like())  # the argument is unchanged


def test_a_channel_that_no_layer_writes_to_stays_constant():
  model = gemma_like()
  for norm in (model.layers.post_attn_norm, model.layers.post_mlp_norm):
    norm.scale.set_value(norm.scale.get_value().at[:, 5].set(-1))  # the factor is 1 + scale
  pruned = absorb.absorb(model, [2, 3], BATCHES, Mode())
  assert (streams(pruned, BATCHES[0])[:, :, 5] == streams(pruned, BATCHES[0])[:1, :, 5]).all()
  assert np.isfinite(streams(pruned, BATCHES[0])).all()


def test_families_that_cannot_be_refitted_are_refused():
  normed_block, normed_stream = gemma_like().spec, tiny_decoder(block='post').spec
  assert not RECIPES['absorb_then_train'].refuses(normed_block)
  for spec, recipe in ((normed_block, 'replace_linear'), (normed_stream, 'absorb'), (normed_stream, 'replace_linear')):
    assert RECIPES[recipe].refuses(spec).startswith('layers of this family normalise')
