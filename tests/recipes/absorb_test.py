"""Removal in closed form, against plain numpy."""

import functools

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
from elder_jax.model.attention import attention
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.spec import Mode
from elder_jax.recipes import RECIPES
from elder_jax.recipes import absorb
from elder_jax.recipes import normed
from elder_jax.recipes import replace_linear
from elder_jax.recipes import streams as streams_lib
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

L = 6
BATCHES = list(np.random.default_rng(0).integers(0, 40, (3, 4, 16), np.int32))


# Only the down projection of the layer before each run.
ONE_MATRIX = functools.partial(absorb.absorb, after=0, attention=False)


def replaced(model, removed, batches, mode, log=None) -> Decoder:
  del mode, log
  return replace_linear.start(Context(model, batches, config_of(num_sequences=12, seq_len=16)), Choice(list(removed)))


def gemma_like() -> Decoder:
  """Gemma's kind of block; the channels of what its MLP adds are of unlike sizes, one of the other sign."""
  model = tiny_decoder(norm='rms1', block='sandwich')
  scale_LD = 0.3 * np.random.default_rng(1).normal(size=(L, 16)) + np.geomspace(0.1, 3, 16) - 1
  scale_LD[:, 3] -= 2
  model.layers.post_mlp_norm.scale.set_value(jnp.array(scale_LD, jnp.float32))
  return model


def streams(model, tokens_BT) -> np.ndarray:
  """What each layer reads and the last writes, [L + 1, tokens, D]."""
  x_BTD, _, x_LBTD = run_layers(model, embed(model, tokens_BT), inputs=True)
  x_MBTD = np.concatenate([x_LBTD, x_BTD[None]]).astype(np.float64)
  return x_MBTD.reshape(len(x_MBTD), -1, 16)


def features(model, l, tokens_BT) -> np.ndarray:
  """What the down projection of layer l reads, by hand."""
  x_BTD = run_layers(model, embed(model, tokens_BT), inputs=True)[2][l]
  block = jax.tree.map(lambda a: a[l], model.layers)
  rope, _ = rope_and_window(model.spec, rope_tables(model.spec, 16), {})
  mid_BTD = x_BTD + block.attn_update(attention(*block.qkv(x_BTD, rope)), x_BTD)
  h = np.asarray(mid_BTD, np.float64)
  scale_D = np.asarray(block.mlp_norm.scale[...]) + (model.spec.norm == 'rms1')
  h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * scale_D
  gate = h @ np.asarray(block.w_gate[...])
  return ((gate / (1 + np.exp(-gate))) * (h @ np.asarray(block.w_up[...]))).reshape(-1, 24)


def w_down(model, l) -> np.ndarray:
  return np.asarray(model.layers.w_down[...][l], np.float64)


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
def test_one_run_is_the_formula_and_changes_nothing_else(refit, plain, removed, l):
  model = tiny_decoder()
  pruned = refit(model, removed, BATCHES, Mode())
  expected = pruning.prune(model, removed)
  kept = pruning.kept_layers(L, removed)
  np.testing.assert_allclose(w_down(pruned, kept.index(l)), plain(model, l, max(removed) + 1), atol=1e-4)
  for i in range(len(kept)):
    assert (w_down(pruned, i) == w_down(expected, i)).all() == (i != kept.index(l))
  expected.layers.w_down.set_value(pruned.layers.w_down.get_value())
  jax.tree.map(np.testing.assert_array_equal, pruned, expected)
  jax.tree.map(np.testing.assert_array_equal, model, tiny_decoder())  # what was given stands


def test_a_second_run_is_fitted_on_the_stream_that_the_first_leaves():
  """Runs after layers 0 and 3. The second's target is the dense stream, what it lacks that of the pruned one."""
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
  # What it reports is what it did: the relative squared error, before and after.
  weight = 1 / (t * t).sum(1, keepdims=True)
  np.testing.assert_allclose(seen[1][2], (weight * r**2).sum() / len(t), rtol=1e-3)
  np.testing.assert_allclose(seen[1][3], (weight * (r - f @ delta) ** 2).sum() / len(t), rtol=1e-3)
  assert seen[1][3] < seen[1][2]


@pytest.mark.parametrize('refit', [ONE_MATRIX, replaced])
def test_a_layer_that_is_linear_in_the_features_is_absorbed_whole(refit, monkeypatch):
  """Layer 2 reads what layer 1 reads and adds 1,000 times as much: layer 1 has to learn layer 2's projection."""
  monkeypatch.setattr(absorb, 'RIDGE', 1e-6)  # what the ridge takes is no part of the question
  model, errors = tiny_decoder(), []
  layers = model.layers
  layers.wo.set_value(layers.wo.get_value().at[2].set(0))
  for weight in (layers.mlp_norm.scale, layers.w_gate, layers.w_up):
    weight.set_value(weight.get_value().at[2].set(weight.get_value()[1]))
  wanted = w_down(model, 2)
  layers.w_down.set_value(layers.w_down.get_value().at[1].set(1e-3 * wanted))
  pruned = refit(model, [2], BATCHES, Mode(), lambda *a: errors.append(a[2:]))
  for before, after in errors:  # replace_linear tells none
    assert before > 1e-3 and after < 1e-4 * before  # there was something to absorb
  np.testing.assert_allclose(w_down(pruned, 1), wanted, atol=0.02 * np.abs(wanted).max())


def normed_parts(model, removed, l, end):
  """(f, r, 1 / ‖target‖²) of all tokens, with what the MLP of layer l of the dense model adds."""
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
def test_before_a_norm_it_is_the_formula_and_changes_nothing_else(removed, l):
  model, seen = gemma_like(), []
  pruned = ONE_MATRIX(model, removed, BATCHES, Mode(), lambda *a: seen.append(a))
  f, r, y, w = normed_parts(model, removed, l, max(removed) + 1)
  scale = 1 + np.asarray(model.layers.post_mlp_norm.scale[...][l], np.float64)
  first = slice(0, BATCHES[0].size)  # of three batches, a quarter is one
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
  jax.tree.map(np.testing.assert_array_equal, model, gemma_like())  # what was given stands


def test_before_a_norm_a_channel_that_no_layer_writes_to_stays_so():
  model = gemma_like()
  for norm in (model.layers.post_attn_norm, model.layers.post_mlp_norm):
    norm.scale.set_value(norm.scale.get_value().at[:, 5].set(-1))  # the factor is 1 + scale
  pruned = absorb.absorb(model, [2, 3], BATCHES, Mode())
  assert (streams(pruned, BATCHES[0])[:, :, 5] == streams(pruned, BATCHES[0])[:1, :, 5]).all()
  assert np.isfinite(streams(pruned, BATCHES[0])).all()


def of_layer(model, l):
  """(x, attention's features, the stream after attention, the MLP's features, what is written) of all tokens."""
  found = []
  for tokens_BT in BATCHES:
    x_BTD = run_layers(model, embed(model, tokens_BT), inputs=True)[2][l]
    block = jax.tree.map(lambda a: a[l], model.layers)
    rope, _ = rope_and_window(model.spec, rope_tables(model.spec, 16), {})
    a_BTNH = attention(*block.qkv(x_BTD, rope))
    attn_BTD = block.attn_update(a_BTNH, x_BTD)
    f_BTF, mid_BTD = block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD
    found.append((x_BTD, a_BTNH, mid_BTD, f_BTF, mid_BTD + block.mlp_update(f_BTF, mid_BTD)))
  return [np.concatenate([np.asarray(a, np.float64).reshape(64, -1) for a in part]) for part in zip(*found)]


def ridge(features: list, r_SD, target_SD, strength: float) -> list:
  """The change of the projection of each group of features, by least squares of stacked rows."""
  w_S1 = 1 / np.linalg.norm(target_SD, axis=1, keepdims=True)
  penalties = [np.sqrt(strength * np.mean(np.sum((w_S1 * f) ** 2, 0))) * np.ones(f.shape[1]) for f in features]
  rows = np.concatenate([w_S1 * np.concatenate(features, 1), np.diag(np.concatenate(penalties))])
  wanted = np.concatenate([w_S1 * r_SD, np.zeros((rows.shape[1], 16))])
  solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
  return np.split(solution, np.cumsum([f.shape[1] for f in features])[:-1])


def add(model, name: str, l: int, change):
  weight = getattr(model.layers, name)
  value = weight.get_value()
  weight.set_value(value.at[l].add(change.reshape(value.shape[1:]).astype(np.float32)))


def plain_around(model, removed, after: int) -> Decoder:
  """Both projections of the layer before the run and of `after` layers behind it, step by step."""
  parallel = model.spec.block == 'parallel'
  kept, end = pruning.kept_layers(L, removed), max(removed) + 1
  p, place = pruning.prune(model, removed), kept.index(min(removed) - 1)
  target = of_layer(model, end - 1)[-1]
  _, a, _, f, y = of_layer(p, place)
  of_wo, of_down = ridge([a, f], target - y, target, absorb.RIDGE)
  add(p, 'wo', place, of_wo)
  if parallel:
    add(p, 'w_down', place, of_down)
  else:
    _, _, _, f, y = of_layer(p, place)
    add(p, 'w_down', place, *ridge([f], target - y, target, absorb.RIDGE))
  for k in kept[place + 1 :][:after]:
    place += 1
    _, _, dense_mid, _, dense = of_layer(model, k)
    _, a, mid, f, y = of_layer(p, place)
    if parallel:
      changes = ridge([a, f], dense - y, dense, absorb.RIDGE)
      for name, change in zip(('wo', 'w_down'), changes):
        add(p, name, place, change)
      continue
    add(p, 'wo', place, *ridge([a], dense_mid - mid, dense_mid, absorb.RIDGE))
    _, _, _, f, y = of_layer(p, place)
    add(p, 'w_down', place, *ridge([f], dense - y, dense, absorb.RIDGE))
  return p


@pytest.mark.parametrize('block', ['pre', 'parallel'])
@pytest.mark.parametrize('after', [1, slow(5)])
def test_both_projections_and_the_layers_behind_are_the_formula(block, after):
  model = tiny_decoder(block=block)
  pruned = absorb.absorb(model, [1, 2], BATCHES, Mode(), after=after)
  expected = plain_around(model, [1, 2], after)
  for name in ('wo', 'w_down'):
    left, right = (np.asarray(getattr(m.layers, name)[...]) for m in (pruned, expected))
    np.testing.assert_allclose(left, right, atol=1e-4 * np.abs(right).max(), err_msg=name)
  for m in (pruned, expected):
    m.layers.wo.set_value(jnp.zeros(())), m.layers.w_down.set_value(jnp.zeros(()))
  jax.tree.map(np.testing.assert_array_equal, pruned, expected)  # nothing else changed
  jax.tree.map(np.testing.assert_array_equal, model, tiny_decoder(block=block))


def test_layers_behind_one_run_end_before_the_next():
  """Between runs after layers 0 and 2 stands one layer, which is the next run's: each layer is refitted once."""
  model, seen = tiny_decoder(), []
  pruned = absorb.absorb(model, [1, 3], BATCHES, Mode(), lambda *a: seen.append(a[:2]), after=1)
  assert seen == [(0, 2), (2, 4)]
  changed = (np.asarray(pruned.layers.wo[...]) != np.asarray(pruning.prune(model, [1, 3]).layers.wo[...])).any(
    (1, 2, 3)
  )
  assert changed.tolist() == [True, True, True, False]


def test_where_the_stream_is_normed_there_is_nothing_to_fold_into():
  normed_block, normed_stream = gemma_like().spec, tiny_decoder(block='post').spec
  assert not RECIPES['absorb_then_train'].refuses(normed_block)
  for spec, recipe in ((normed_block, 'replace_linear'), (normed_stream, 'absorb'), (normed_stream, 'replace_linear')):
    assert RECIPES[recipe].refuses(spec).startswith('layers of this family normalise')


@pytest.mark.parametrize('refit', [ONE_MATRIX, absorb.absorb, replaced])
def test_the_stream_comes_nearer_to_the_dense_one(refit):
  model, removed = tiny_decoder(), [2, 3]

  def distance(m):
    return sum(float(jnp.sum((streams(m, b)[-1] - streams(model, b)[-1]) ** 2)) for b in BATCHES)

  assert distance(refit(model, removed, BATCHES, Mode())) < 0.8 * distance(pruning.prune(model, removed))


def test_a_run_at_the_bottom_has_no_layer_before_it():
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
def test_eight_devices_make_what_one_does(eight_devices, recipe):
  def make(model, batches):
    context = Context(model, batches, config_of(num_sequences=12, batch_size=4, seq_len=16))
    result = RECIPES[recipe].start(context, Choice([1, 3]))
    places = sharding.for_model(result, result.layers.wo.get_value().sharding.mesh).layers
    for name in ('wo', 'w_down'):
      assert getattr(result.layers, name).get_value().sharding == getattr(places, name).get_value()
    return jax.tree.map(np.asarray, result)

  one, eight = on_one_and_eight(tiny_decoder(), BATCHES, eight_devices, make)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, eight)


def test_streams_that_wait_in_the_memory_of_the_hosts_are_the_same(monkeypatch):
  expected, moved = absorb.absorb(tiny_decoder(), [1, 3], BATCHES, Mode()), []
  move = streams_lib._moved
  monkeypatch.setattr(streams_lib, '_waits_apart', lambda: True)
  monkeypatch.setattr(streams_lib, '_moved', lambda x_BTD, kind: moved.append(kind) or move(x_BTD, kind))
  jax.tree.map(np.testing.assert_array_equal, absorb.absorb(tiny_decoder(), [1, 3], BATCHES, Mode()), expected)
  assert {'pinned_host', 'device'} == set(moved)
