"""LaCo: what a merge computes, which merges are kept, and that the number of removed layers is exact."""

import jax
import numpy as np
import pytest
from tiny import config_of
from tiny import slow

from elder_jax import methods
from elder_jax.errors import InputError
from elder_jax.methods import laco as laco_lib
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec

SPEC = Spec(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)
L = 10
BATCHES = list(np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 3, 9), np.int32))


@pytest.fixture(scope='module')
def model() -> Decoder:
  """A random model, including the scales of the norms."""
  model = Decoder(SPEC, L, jax.random.key(0))
  for i, norm in enumerate((model.layers.attn_norm.scale, model.layers.mlp_norm.scale)):
    norm.set_value(jax.random.uniform(jax.random.key(i), norm.get_value().shape, minval=0.5, maxval=1.5))
  return model


def layers_of(model: Decoder) -> dict[str, np.ndarray]:
  return {
    jax.tree_util.keystr(path): np.asarray(a, np.float64)
    for path, a in jax.tree_util.tree_flatten_with_path(model.layers)[0]
  }


def by_formula(model: Decoder, merges) -> dict[str, np.ndarray]:
  """Returns the remaining layers, after θ_l + Σ_k (θ_{l+k} − θ_l) for one merge after another."""
  layers, gone = layers_of(model), []
  for base, *members in merges:
    for a in layers.values():
      a[base] = a[base] + sum(a[k] - a[base] for k in members)
    gone += members
  return {name: np.delete(a, gone, 0) for name, a in layers.items()}


def output(model: Decoder, tokens_BT) -> np.ndarray:
  x_BTD, _ = jax.jit(forward)(pruning.with_gates(model, 1.0), tokens_BT)
  return np.asarray(x_BTD, np.float64)


def cosine(a: Decoder, b: Decoder) -> float:
  """Returns the cosine between the outputs of a whole sequence, averaged over the sequences."""
  cosines = []
  for tokens_BT in BATCHES:
    for x_TD, y_TD in zip(output(a, tokens_BT), output(b, tokens_BT)):
      cosines.append(np.vdot(x_TD, y_TD) / np.linalg.norm(x_TD) / np.linalg.norm(y_TD))
  return np.mean(cosines)


def check(model: Decoder, result: laco_lib.Collapsed, n: int):
  """Checks what must hold for every result."""
  assert len(result.removed) == len(set(result.removed)) == n and result.model.num_layers == L - n
  assert result.removed == [k for group in result.merges for k in group[1:]]
  expected = by_formula(model, result.merges)
  for name, a in layers_of(result.model).items():
    np.testing.assert_allclose(a, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(result.cosine, cosine(model, result.model), rtol=1e-5)
  assert result.cosine > result.threshold
  assert (np.asarray(result.model.gate_L[...]) == 1).all()


@pytest.mark.parametrize('n', [1, slow(2), slow(3), 4, slow(5), 6])
def test_exactly_n_layers_are_merged_away(model, n):
  result = laco_lib.laco(model, n, BATCHES, Mode())
  check(model, result, n)
  assert all(len(group) <= min(4, n + 1) for group in result.merges)
  assert L - 1 not in result.removed  # the last layer is kept
  assert result.threshold == round(result.threshold, 2) <= 0.95


def test_one_layer_by_the_plain_formula(model):
  """The threshold accepts every merge, so the first one, near the output, is kept."""
  result = laco_lib.laco(model, 1, BATCHES, Mode(), threshold=-1.0)
  assert result.merges == [(L - 3, L - 2)] and result.threshold == -1.0
  check(model, result, 1)
  # θ_l + (θ_{l+1} − θ_l) is the later layer, so the result equals the model without the earlier one.
  np.testing.assert_allclose(
    output(result.model, BATCHES[0]), output(pruning.prune(model, [L - 3]), BATCHES[0]), atol=1e-5
  )


def test_the_first_merge_above_the_threshold_is_kept(model):
  pairs = {l: cosine(model, pruning.prune(model, [l])) for l in range(L - 2)}
  for threshold in (0.9, 0.5):
    result = laco_lib.laco(model, 1, BATCHES, Mode(), threshold=threshold, step=0.01)
    above = [l for l in pairs if pairs[l] > result.threshold]
    assert result.merges == [(max(above), max(above) + 1)]
    # The threshold is the highest of threshold, threshold − step, … that any merge passes.
    best = max(pairs.values())
    assert result.threshold == threshold if best > threshold else result.threshold < best <= result.threshold + 0.011


def test_four_layers_become_one(model):
  result = laco_lib.laco(model, 3, BATCHES, Mode(), threshold=-1.0)
  assert result.merges == [(5, 6, 7, 8)] and result.removed == [6, 7, 8]
  check(model, result, 3)


def test_the_interval_and_the_last_smaller_merge(model):
  def run(**more):
    return laco_lib.laco(model, 4, BATCHES, Mode(), threshold=-1.0, **more).merges

  # 10 layers, C = 4: the sweep starts at 5. Then 7 layers are left, and l = 5 − 2 = 3 has too few after it: l = 2.
  assert run() == [(5, 6, 7, 8), (2, 3)]
  assert run(interval=5) == [(5, 6, 7, 8), (0, 1)]
  assert run(combine=2, interval=1) == [(7, 8), (6, 7), (5, 6), (4, 5)]
  assert run(combine=3, interval=4) == [(6, 7, 8), (2, 3, 4)]


def test_a_merged_layer_can_be_merged_again(model):
  result = laco_lib.laco(model, 6, BATCHES, Mode(), combine=4, interval=2, threshold=-1.0)
  check(model, result, 6)
  assert result.merges == [(5, 6, 7, 8), (2, 3, 4, 5)]


def test_merging_layers_without_effect_does_not_change_the_output(model):
  """Layers 3 … 6 are equal and have no effect. Merging them with the next layer gives the next layer."""
  model = jax.tree.map(lambda a: a, model)
  model.layers = jax.tree.map(lambda a: a.at[3:7].set(a[3]), model.layers)
  for param in (model.layers.wo, model.layers.w_down):
    param.set_value(param.get_value().at[3:7].set(0.0))
  result = laco_lib.laco(model, 3, BATCHES, Mode(), threshold=0.999)
  check(model, result, 3)
  assert result.merges == [(4, 5, 6, 7)] and result.threshold == 0.999
  np.testing.assert_allclose(result.cosine, 1, atol=1e-6)


def test_the_argument_is_unchanged_and_its_gates_are_ignored(model):
  before = layers_of(model)
  expected = laco_lib.laco(model, 4, BATCHES, Mode())
  result = laco_lib.laco(pruning.with_gates(model, 0.3), 4, BATCHES, Mode(gate='output'))
  assert result.merges == expected.merges
  np.testing.assert_allclose(result.cosine, expected.cosine, rtol=1e-5)
  for name, a in layers_of(model).items():
    np.testing.assert_array_equal(a, before[name])


def test_sweeps_compile_once_and_try_each_merge_once(model, monkeypatch):
  tried, similarity = [], laco_lib._similarity
  monkeypatch.setattr(
    laco_lib, '_similarity', lambda m, x, group, *more: tried.append(group) or similarity(m, x, group, *more)
  )
  batches = [batch[:2] for batch in BATCHES]  # a shape that no other test uses
  before = laco_lib._cosine_sum._cache_size()
  result = laco_lib.laco(model, 5, batches, Mode())
  assert laco_lib._cosine_sum._cache_size() == before + 1
  assert result.threshold < 0.9  # so there was more than one sweep
  assert tried.count((5, 6, 7, 8)) == 1


def test_nothing_to_merge(model):
  result = laco_lib.laco(model, 0, BATCHES, Mode())
  assert (result.removed, result.merges, result.cosine) == ([], [], 1.0) and result.model.num_layers == L


@pytest.mark.parametrize('num_layers, num_remove, most', [(10, 8, 6), (3, 2, 0)])
def test_more_layers_than_can_be_merged_are_refused(num_layers, num_remove, most):
  with pytest.raises(InputError, match=f'method=laco: can merge away at most {most} of the {num_layers} layers'):
    methods.check('laco', config_of(), num_layers, num_remove)
  with pytest.raises(InputError, match='method=laco: cannot merge away'):
    laco_lib.laco(Decoder(SPEC, num_layers, jax.random.key(0)), num_remove, BATCHES, Mode())


def test_an_output_that_is_not_finite_is_an_error(model):
  model = jax.tree.map(lambda a: a, model)
  model.layers.wq.set_value(model.layers.wq.get_value().at[2].set(np.nan))
  with pytest.raises(InputError, match='method=laco: the output of a model is not finite'):
    laco_lib.laco(model, 2, BATCHES, Mode())
