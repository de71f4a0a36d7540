"""linear_patch, ghosted and prune_comp against their published formulas in plain NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of
from tiny import tiny_decoder

from elder_jax.errors import InputError
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.decoder import run_layers
from elder_jax.model.spec import Mode
from elder_jax.recipes import RECIPES
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.recipes.hadamard import hadamard
from elder_jax.run import pipeline
from elder_jax.text.decoding import decode_step
from elder_jax.text.decoding import prefill
from elder_jax.training.settings import TrainSettings
from elder_jax.training.trainer import train

L = 6
BATCHES = list(np.random.default_rng(0).integers(0, 40, (3, 4, 16), np.int32))
BLOCKS = [dict(), dict(block='parallel', shared_norm=True), dict(norm='rms1', block='sandwich')]


def start(recipe: str, model: Decoder, removed) -> Decoder:
  config = config_of(num_sequences=12, batch_size=4, seq_len=16)
  return RECIPES[recipe].start(Context(model, BATCHES, config), Choice(list(removed)))


def streams(model, tokens_BT) -> np.ndarray:
  """Returns the input of each layer and the output of the last, [L + 1, B, T, D]."""
  x_BTD, _, x_LBTD = run_layers(model, embed(model, tokens_BT), inputs=True)
  return np.concatenate([x_LBTD, x_BTD[None]]).astype(np.float64)


def before_and_after(model, first, end):
  x = np.concatenate([streams(model, tokens_BT) for tokens_BT in BATCHES], 1)
  return x[first], x[end]


def with_maps(model, tokens_BT, removed, map_of: dict) -> np.ndarray:
  """Returns the output of the layers without `removed`, with the output of layer l multiplied by map_of[l]."""
  x_BTD = embed(model, tokens_BT)
  for l in pruning.kept_layers(L, removed):
    x_BTD = run_layers(model, x_BTD, np.arange(L) == l)[0]
    if l in map_of:
      x_BTD = jnp.asarray(np.asarray(x_BTD, np.float64) @ map_of[l], jnp.float32)
  return np.asarray(x_BTD)


def plain_linear_patch(x_BTD, y_BTD) -> np.ndarray:
  H = hadamard(16)
  ratio_BD = np.abs(y_BTD @ H).mean(1) / np.abs(x_BTD @ H).mean(1)
  return H @ np.diag(ratio_BD.mean(0)) @ H.T


def plain_ghosted(x_BTD, y_BTD) -> np.ndarray:
  x, y = x_BTD.reshape(-1, 16), y_BTD.reshape(-1, 16)
  return np.eye(16) + np.linalg.lstsq(x, y - x, rcond=None)[0]


@pytest.mark.parametrize('features', BLOCKS)
@pytest.mark.parametrize('recipe, plain', [('linear_patch', plain_linear_patch), ('ghosted', plain_ghosted)])
def test_the_matrix_at_each_gap_equals_the_formula(recipe, plain, features):
  model, removed = tiny_decoder(**features), [1, 3, 4]
  patched = start(recipe, model, removed)
  maps = {l: plain(*before_and_after(model, l + 1, end)) for l, end in ((0, 2), (2, 5))}
  for tokens_BT in BATCHES:
    wanted = with_maps(model, tokens_BT, removed, maps)
    np.testing.assert_allclose(
      run_layers(patched, embed(patched, tokens_BT))[0], wanted, atol=1e-4 * np.abs(wanted).max()
    )
  jax.tree.map(np.testing.assert_array_equal, model, tiny_decoder(**features))


def test_generation_uses_the_matrices():
  model = start('ghosted', tiny_decoder(), [2, 3])
  tokens_BT = BATCHES[0]
  all_BTV = logits_of(model, forward(model, tokens_BT)[0])
  first_BV, cache = prefill(model, tokens_BT[:, :8], np.full(4, 8), 16)
  np.testing.assert_allclose(first_BV, all_BTV[:, 7], atol=1e-4)
  next_BV, _ = decode_step(model, cache, tokens_BT[:, 8], np.full(4, 8))
  np.testing.assert_allclose(next_BV, all_BTV[:, 8], atol=1e-4)


@pytest.mark.parametrize('features', [*BLOCKS, dict(norm='layer', mlp_bias=True, out_bias=True, num_positions=16)])
@pytest.mark.parametrize('tied', [True, False])
def test_prune_comp_multiplies_the_residual_stream_at_each_gap(features, tied):
  features |= dict(tied=tied, norm_eps=1e-12)  # norms cancel the factor only if epsilon is negligible
  model, removed = tiny_decoder(**features), [1, 3, 4]
  rescaled = start('prune_comp', model, removed)
  alphas, x = {}, [embed(model, tokens_BT) for tokens_BT in BATCHES]
  for l, end in ((0, 2), (2, 5)):
    ratios = []
    for i, x_BTD in enumerate(x):
      x_BTD = run_layers(model, x_BTD, np.arange(L) == l)[0]
      y_BTD = run_layers(model, x_BTD, (np.arange(L) > l) & (np.arange(L) < end))[0]
      ratios.append(np.abs(y_BTD).mean(1) / np.abs(x_BTD).mean(1))
      x[i] = x_BTD
    alphas[l] = float(np.concatenate(ratios).mean())
    x = [x_BTD * alphas[l] for x_BTD in x]
  assert all(abs(alpha - 1) > 1e-2 for alpha in alphas.values())
  maps = {l: alpha * np.eye(16) for l, alpha in alphas.items()}
  for tokens_BT in BATCHES:
    wanted = with_maps(model, tokens_BT, removed, maps)
    x_BTD = run_layers(rescaled, embed(rescaled, tokens_BT))[0]
    np.testing.assert_allclose(x_BTD, wanted, atol=1e-4 * np.abs(wanted).max())
    # The logits are those of the plainly rescaled hidden states, too.
    logits = logits_of(model, model.final_norm(jnp.asarray(wanted)))
    np.testing.assert_allclose(logits_of(rescaled, forward(rescaled, tokens_BT)[0]), logits, atol=1e-3)


@pytest.mark.parametrize('d', [1, 2, 12, 20, 28, 36, 84, 576, 640, 896, 2304, 3584, 5120])
def test_hadamard_matrices(d):
  H = hadamard(d)
  np.testing.assert_allclose(H @ H.T, np.eye(d), atol=1e-9)
  np.testing.assert_allclose(np.abs(H), d**-0.5)


@pytest.mark.parametrize('d', [3, 6, 92, 25])
def test_an_order_without_a_hadamard_matrix_is_refused(d):
  """There is one of order 92, but not by these constructions."""
  with pytest.raises(ValueError, match=f'order {d}'):
    hadamard(d)
  spec = dataclasses.replace(tiny_decoder().spec, d_model=d)
  assert '--recipe=ghosted' in RECIPES['linear_patch'].refuses(spec)


def test_rows_of_a_run(settings, tmp_path):
  """Recipes that leave a matrix are rows of the table and cannot be exported."""
  league = ('prune_comp', 'linear_patch', 'linear_patch_tuned', 'ghosted', 'ghosted_then_train')
  report = pipeline.run(config_of(**settings | dict(recipe='absorb', compare=league, train_steps=4, lr=1e-2)))
  ppl = {row['recipe']: row['ppl'] for row in report['rows']}
  assert set(ppl) == {'absorb', *league} and len({tuple(p.values()) for p in ppl.values()}) == 6
  for recipe in league[1:]:
    with pytest.raises(InputError, match='no standard checkpoint can hold'):
      config_of(**settings | dict(recipe=recipe))


def test_linear_patch_tuned_trains_only_the_matrices_at_the_gaps():
  model = start('linear_patch', tiny_decoder(), [2, 3])
  settings = TrainSettings(steps=3, lr=1e-2, only='patch', lora_rank=2)
  tuned = train(model, [], settings, Mode(), BATCHES)
  moved = (np.asarray(tuned.layers.patch[...]) != np.asarray(model.layers.patch[...])).any((1, 2))
  assert moved.tolist() == [False, True, False, False]
  for m in (model, tuned):
    m.layers.patch.set_value(jnp.zeros(()))
  jax.tree.map(np.testing.assert_array_equal, model, tuned)
