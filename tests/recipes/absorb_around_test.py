"""absorb with both projections and the layers after the gap refitted, against plain NumPy."""

from absorption import BATCHES
from absorption import L
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import slow
from tiny import tiny_decoder

from elder_jax.model import pruning
from elder_jax.model.attention import attention
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb


def of_layer(model, l):
  """Returns the input, attention's features, the stream after attention, the MLP's features and the output of layer l."""
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
  """Ridge regression as least squares with stacked rows. Returns the change of the projection per group of features."""
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
  """Refits both projections of the layer before the removed block and of `after` layers after it, step by step."""
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
def test_both_projections_and_the_layers_after_the_gap_equal_the_formula(block, after):
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


def test_every_layer_is_refitted_once_even_between_two_gaps():
  """Layer 2 is the only layer between the two gaps. It is refitted as the layer before the second one."""
  model, seen = tiny_decoder(), []
  pruned = absorb.absorb(model, [1, 3], BATCHES, Mode(), lambda *a: seen.append(a[:2]), after=1)
  assert seen == [(0, 2), (2, 4)]
  changed = (np.asarray(pruned.layers.wo[...]) != np.asarray(pruning.prune(model, [1, 3]).layers.wo[...])).any(
    (1, 2, 3)
  )
  assert changed.tolist() == [True, True, True, False]
