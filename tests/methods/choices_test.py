"""The layers that the scoring methods choose, on one device and on eight."""

import jax
import numpy as np
import pytest
from rivals import BATCHES
from rivals import METHODS
from rivals import SPEC
from rivals import L
from rivals import ascending
from rivals import choose
from rivals import middle
from tiny import Endless

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.methods import laco as laco_lib
from elder_jax.methods.ablation import nll_without_each
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Choice
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.training.settings import TrainSettings
from elder_jax.training.trainer import train

NESTED = ['shortgpt', 'taylor', 'ppl', 'sleb', 'magnitude', 'random']


@pytest.fixture(scope='module')
def trained() -> Decoder:
  """A model trained on BATCHES, so that removing any layer raises the LM loss."""
  settings = TrainSettings(steps=40, lr=5e-3, lambda2=0.0)
  model = Decoder(SPEC, L, jax.random.key(0))
  return train(model, [], settings, Mode(), Endless(lambda i: BATCHES[i % 2]))


def without_effect(model: Decoder, *layers: int) -> Decoder:
  """Returns a copy in which the updates of these layers are exactly 0."""
  model = jax.tree.map(lambda a: a, model)
  for param in (model.layers.wo, model.layers.w_down):
    param.set_value(param.get_value().at[np.array(layers)].set(0.0))
  return model


@pytest.mark.parametrize('method', ['shortgpt', 'ppl', 'sleb', 'taylor', 'uidl', 'cosine_block'])
def test_a_layer_without_effect_is_chosen_first(trained, method):
  assert choose(method, without_effect(trained, 5), 1).removed == [5]


def test_the_score_of_a_layer_without_effect(trained):
  model = without_effect(trained, 5, 4)
  windows = perplexity_lib.Windows(np.concatenate(BATCHES), {})
  dense = perplexity_lib.perplexity(model, windows, Mode(), 8)
  for method, value in {'shortgpt': 0, 'taylor': 0, 'uidl': 0, 'ppl': dense, 'sleb': np.log(dense)}.items():
    choice = choose(method, model, 1)
    np.testing.assert_allclose([choice.scores[4], choice.scores[5]], value, rtol=1e-6, atol=3e-7, err_msg=method)
    assert min(choice.scores) == min(choice.scores[4:6]), method
  # If scores are exactly equal, the lower layer is chosen first.
  assert choose('taylor', model, 2).removed == choose('sleb', model, 2).removed == [4, 5]
  assert choose('uidl', model, 1).removed == [4] and choose('uidl', model, 2).removed == [4, 5]


@pytest.mark.parametrize('method', NESTED)
def test_the_choice_of_fewer_layers_begins_the_choice_of_more(trained, method):
  most = choose(method, trained, 3).removed
  assert len(set(most)) == 3
  for n in (1, 2):
    assert choose(method, trained, n).removed == most[:n]


def test_one_shot_scores_do_not_depend_on_the_number_of_layers(trained):
  for method in ('shortgpt', 'taylor', 'ppl', 'magnitude', 'random'):
    assert choose(method, trained, 1).scores == choose(method, trained, 3).scores
    scores = choose(method, trained, 3).scores
    candidates = middle(L) if method in ('taylor', 'ppl') else range(L)
    assert choose(method, trained, 3).removed == ascending(scores, candidates)[:3]


def test_sleb_scores_as_if_the_chosen_layers_had_been_pruned(trained):
  choice = choose('sleb', trained, 3)
  windows = perplexity_lib.Windows(np.concatenate(BATCHES), {})
  for i, layer in enumerate(choice.removed):
    ppl = perplexity_lib.perplexity(pruning.prune(trained, choice.removed[: i + 1]), windows, Mode(), 8)
    np.testing.assert_allclose(choice.scores[layer], np.log(ppl), rtol=1e-6)


def test_sleb_compiles_once(trained):
  compiled = nll_without_each._cache_size
  batches = [batch[:3] for batch in BATCHES]  # a shape that no other test uses
  before = compiled()
  choose('sleb', trained, 4, batches, Mode())
  choose('ppl', trained, 2, batches, Mode())
  assert compiled() == before + 1


def test_magnitude_sums_the_absolute_weights_of_the_matrices():
  model = Decoder(SPEC, L, jax.random.key(1))
  matrices = [np.asarray(getattr(model.layers, n)[...]) for n in 'wq wk wv wo w_gate w_up w_down'.split()]
  expected_L = sum(np.abs(a).sum(tuple(range(1, a.ndim)), dtype=np.float64) for a in matrices)
  choice = choose('magnitude', model, L)
  np.testing.assert_allclose(choice.scores, expected_L, rtol=1e-6)
  assert choice.removed == ascending(expected_L, range(L))


def test_random_depends_on_the_seed_only(trained):
  orders = [choose('random', trained, L, seed=s).removed for s in range(5)]
  assert all(sorted(order) == list(range(L)) for order in orders)
  assert len({tuple(order) for order in orders}) == 5
  assert choose('random', Decoder(SPEC, L, jax.random.key(3)), L, seed=3).removed == orders[3]


def test_last_keeps_the_final_layer(trained):
  assert choose('last', trained, 3) == Choice([5, 6, 7], [])
  assert choose('last', trained, L - 1).removed == list(range(L - 1))


@pytest.mark.parametrize('method', METHODS)
def test_batch_size_and_gates_do_not_change_the_choice(trained, method):
  expected = choose(method, trained, 2)
  whole = np.concatenate(BATCHES)
  choice = choose(method, pruning.with_gates(trained, 0.5), 2, [whole[:12], whole[12:]], Mode(gate='output'))
  np.testing.assert_allclose(choice.scores, expected.scores, rtol=2e-5, atol=1e-6)
  assert choice.removed == expected.removed


@pytest.mark.parametrize('method', ['shortgpt', 'cosine_block', 'uidl', 'taylor', 'ppl', 'sleb'])
def test_bfloat16(trained, method):
  expected, choice = choose(method, trained, 1), choose(method, trained, 1, mode=Mode(dtype='bfloat16', remat='full'))
  assert choice.scores != expected.scores
  scale = np.abs(expected.scores).max()
  # The gradients of a trained model almost cancel between tokens, which loses precision in bfloat16.
  atol = 0.15 if method == 'taylor' else 0.03
  np.testing.assert_allclose(np.array(choice.scores) / scale, np.array(expected.scores) / scale, atol=atol)


def test_nothing_to_remove(trained):
  for method in METHODS:
    assert choose(method, trained, 0) == Choice([], [])


@pytest.mark.parametrize('method, most', [(m, {'taylor': 3, 'ppl': 3, 'last': L - 1}.get(m, L)) for m in METHODS])
def test_more_layers_than_a_method_can_remove_are_refused(trained, method, most):
  with pytest.raises(InputError, match=rf'method={method}: can remove at most {most} of the 9 layers, not {most + 1};'):
    choose(method, trained, most + 1)


def test_a_model_with_only_protected_layers_is_refused():
  for method in ('taylor', 'ppl'):
    with pytest.raises(InputError, match=rf'method={method}: can remove at most 0 of the 5 layers, not 1;'):
      choose(method, Decoder(SPEC, 5, jax.random.key(0)), 1)


def test_an_unknown_method_is_refused():
  with pytest.raises(InputError, match='method=best: is not known; choose one of: auto, swaps, mask, elder, '):
    choose('best', Decoder(SPEC, L, jax.random.key(0)), 1)


def test_scores_that_are_not_finite_are_an_error(trained):
  model = jax.tree.map(lambda a: a, trained)
  model.layers.wq.set_value(model.layers.wq.get_value().at[2].set(np.nan))
  for method in ('shortgpt', 'taylor', 'ppl', 'uidl', 'magnitude'):
    with pytest.raises(InputError, match=rf'method={method}: some scores are not finite'):
      choose(method, model, 1)


def test_eight_devices_choose_the_same_layers_as_one(eight_devices):
  whole, result = Decoder(SPEC, L, jax.random.key(0)), {}
  for sizes in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(sizes, jax.devices()[: 1 if sizes == (1, 1, 1) else 8])
    with jax.set_mesh(mesh):
      model = jax.tree.map(jax.device_put, whole, sharding.for_model(whole, mesh, sizes))
      batches = [sharding.put_batch(batch, mesh) for batch in BATCHES]
      result[sizes] = {}
      for method in METHODS:
        choice = choose(method, model, 3, batches, Mode())
        result[sizes][method] = choice.removed, choice.scores
      collapsed = laco_lib.laco(model, 3, batches, Mode())
      cut_LDF, whole_LDF = collapsed.model.layers.w_up[...], model.layers.w_up[...]
      assert cut_LDF.sharding.shard_shape((1, 16, 24)) == whole_LDF.sharding.shard_shape((1, 16, 24))
      result[sizes]['laco'] = collapsed.removed, [collapsed.cosine, collapsed.threshold]
  assert len(result[2, 2, 2]) == len(METHODS) + 1
  for method, (removed, scores) in result[2, 2, 2].items():
    assert removed == result[1, 1, 1][method][0], method
    np.testing.assert_allclose(scores, result[1, 1, 1][method][1], rtol=1e-5, atol=1e-6, err_msg=method)
