"""absorb and replace_linear with one refitted projection, against plain NumPy."""

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
from tiny import config_of
from tiny import on_one_and_eight
from tiny import slow
from tiny import tiny_decoder

from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes import RECIPES
from elder_jax.recipes import absorb
from elder_jax.recipes import replace_linear
from elder_jax.recipes import streams as streams_lib
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context


def replaced(model, removed, batches, mode, log=None) -> Decoder:
  del mode, log
  return replace_linear.start(Context(model, batches, config_of(num_sequences=12, seq_len=16)), Choice(list(removed)))


def plain_absorb(model, l, end) -> np.ndarray:
  f, r, t = [], [], []
  for tokens_BT in BATCHES:
    x = streams(model, tokens_BT)
    f.append(features(model, l, tokens_BT))
    r.append(x[end] - x[l + 1])
    t.append(x[end])
  f, r, t = (np.concatenate(a) for a in (f, r, t))
  weighted = f / (t * t).sum(1, keepdims=True)
  gram = weighted.T @ f
  return w_down(model, l) + np.linalg.solve(gram + absorb.RIDGE * gram.trace() / 24 * np.eye(24), weighted.T @ r)


def plain_replace(model, l, end) -> np.ndarray:
  a, wanted = [], []
  for tokens_BT in BATCHES:
    x = streams(model, tokens_BT)
    out = features(model, l, tokens_BT) @ w_down(model, l)
    a.append(out)
    wanted.append(x[end] - (x[l + 1] - out))
  return w_down(model, l) @ np.linalg.lstsq(np.concatenate(a), np.concatenate(wanted), rcond=None)[0]


@pytest.mark.parametrize('refit, plain', [(ONE_MATRIX, plain_absorb), (replaced, plain_replace)])
@pytest.mark.parametrize('removed, l', [([2, 3], 1), slow([5], 4), ([3, 1, 2], 0)])
def test_one_removed_block_equals_the_formula_and_changes_nothing_else(refit, plain, removed, l):
  model = tiny_decoder()
  pruned = refit(model, removed, BATCHES, Mode())
  expected = pruning.prune(model, removed)
  kept = pruning.kept_layers(L, removed)
  np.testing.assert_allclose(w_down(pruned, kept.index(l)), plain(model, l, max(removed) + 1), atol=1e-4)
  for i in range(len(kept)):
    assert (w_down(pruned, i) == w_down(expected, i)).all() == (i != kept.index(l))
  expected.layers.w_down.set_value(pruned.layers.w_down.get_value())
  jax.tree.map(np.testing.assert_array_equal, pruned, expected)
  jax.tree.map(np.testing.assert_array_equal, model, tiny_decoder())  # the argument is unchanged


def test_a_second_block_is_fitted_on_the_output_of_the_first_refit():
  """Removes layers 1 and 4. The target of the second refit is the dense stream, its input that of the refitted model."""
  model, seen = tiny_decoder(), []
  pruned = ONE_MATRIX(model, [1, 4], BATCHES, Mode(), lambda *a: seen.append(a))
  assert [a[:2] for a in seen] == [(0, 2), (3, 5)]
  first = ONE_MATRIX(model, [1], BATCHES, Mode())  # its layers: 0, 2, 3, 4, 5
  f, r, t = [], [], []
  for tokens_BT in BATCHES:
    target = streams(model, tokens_BT)[5]
    f.append(features(first, 2, tokens_BT))
    r.append(target - streams(first, tokens_BT)[3])
    t.append(target)
  f, r, t = (np.concatenate(a) for a in (f, r, t))
  weighted = f / (t * t).sum(1, keepdims=True)
  gram = weighted.T @ f
  delta = np.linalg.solve(gram + absorb.RIDGE * gram.trace() / 24 * np.eye(24), weighted.T @ r)
  np.testing.assert_allclose(w_down(pruned, 2), w_down(first, 2) + delta, atol=3e-4)
  # The reported relative squared errors, before and after, are the actual ones.
  weight = 1 / (t * t).sum(1, keepdims=True)
  np.testing.assert_allclose(seen[1][2], (weight * r**2).sum() / len(t), rtol=1e-3)
  np.testing.assert_allclose(seen[1][3], (weight * (r - f @ delta) ** 2).sum() / len(t), rtol=1e-3)
  assert seen[1][3] < seen[1][2]


@pytest.mark.parametrize('refit', [ONE_MATRIX, replaced])
def test_a_layer_that_is_linear_in_the_features_is_absorbed_completely(refit, monkeypatch):
  """Layer 2 has the features of layer 1 and an update 1,000 times as large: layer 1 must get layer 2's projection."""
  monkeypatch.setattr(absorb, 'RIDGE', 1e-6)  # so small that the solution is that of least squares
  model, errors = tiny_decoder(), []
  layers = model.layers
  layers.wo.set_value(layers.wo.get_value().at[2].set(0))
  for weight in (layers.mlp_norm.scale, layers.w_gate, layers.w_up):
    weight.set_value(weight.get_value().at[2].set(weight.get_value()[1]))
  wanted = w_down(model, 2)
  layers.w_down.set_value(layers.w_down.get_value().at[1].set(1e-3 * wanted))
  pruned = refit(model, [2], BATCHES, Mode(), lambda *a: errors.append(a[2:]))
  for before, after in errors:  # replace_linear reports none
    assert before > 1e-3 and after < 1e-4 * before  # there was something to absorb
  np.testing.assert_allclose(w_down(pruned, 1), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize('refit', [ONE_MATRIX, absorb.absorb, replaced])
def test_hidden_states_get_closer_to_the_dense_ones(refit):
  model, removed = tiny_decoder(), [2, 3]

  def distance(m):
    return sum(float(jnp.sum((streams(m, b)[-1] - streams(model, b)[-1]) ** 2)) for b in BATCHES)

  assert distance(refit(model, removed, BATCHES, Mode())) < 0.8 * distance(pruning.prune(model, removed))


def test_a_block_that_starts_at_layer_0_is_removed_without_a_refit():
  model, seen = tiny_decoder(), []
  pruned = absorb.absorb(model, [0, 1], BATCHES, Mode(), lambda *a: seen.append(a))
  assert seen == []
  jax.tree.map(np.testing.assert_array_equal, pruned, pruning.prune(model, [0, 1]))


def test_bfloat16():
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_decoder())
  pruned = ONE_MATRIX(low, [2], BATCHES, Mode(dtype='bfloat16'))
  assert pruned.layers.w_down.get_value().dtype == jnp.bfloat16
  exact = ONE_MATRIX(tiny_decoder(), [2], BATCHES, Mode())
  assert np.abs(w_down(pruned, 1) - w_down(exact, 1)).mean() < 0.1 * np.abs(w_down(exact, 1)).mean()


@pytest.mark.parametrize('recipe', ['absorb', slow('ghosted'), slow('prune_comp'), slow('replace_linear')])
def test_eight_devices_give_the_same_model_as_one(eight_devices, recipe):
  def make(model, batches):
    context = Context(model, batches, config_of(num_sequences=12, batch_size=4, seq_len=16))
    result = RECIPES[recipe].start(context, Choice([1, 3]))
    places = sharding.for_model(result, result.layers.wo.get_value().sharding.mesh).layers
    for name in ('wo', 'w_down'):
      assert getattr(result.layers, name).get_value().sharding == getattr(places, name).get_value()
    return jax.tree.map(np.asarray, result)

  one, eight = on_one_and_eight(tiny_decoder(), BATCHES, eight_devices, make)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, eight)


def test_hidden_states_moved_to_host_memory_give_the_same_result(monkeypatch):
  expected, moved = absorb.absorb(tiny_decoder(), [1, 3], BATCHES, Mode()), []
  move = streams_lib._moved
  monkeypatch.setattr(streams_lib, '_waits_apart', lambda: True)
  monkeypatch.setattr(streams_lib, '_moved', lambda x_BTD, kind: moved.append(kind) or move(x_BTD, kind))
  jax.tree.map(np.testing.assert_array_equal, absorb.absorb(tiny_decoder(), [1, 3], BATCHES, Mode()), expected)
  assert {'pinned_host', 'device'} == set(moved)
