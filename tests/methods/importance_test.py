"""Rivals' scores against the published formulas in PyTorch; on one device and on eight."""

import pathlib

import jax
import numpy as np
import pytest
import tiny
from tiny import Endless

from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import open_source
from elder_jax.methods import METHODS as ALL_METHODS
from elder_jax.methods import ablation as ablation_module
from elder_jax.methods import laco as laco_lib
from elder_jax.methods.ablation import _loss_without_each
from elder_jax.methods.ablation import nll_without_each
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.recipes.context import Choice
from elder_jax.text import data
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.training.settings import TrainSettings
from elder_jax.training.trainer import train

ASSETS = pathlib.Path('~/.cache/elder_jax').expanduser()
GGUF = ASSETS / 'SmolLM2-135M-Instruct.Q4_1.gguf'
NEWS = ASSETS / 'lee_news.txt'

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
L = 9
BATCHES = list(np.random.default_rng(0).integers(0, SPEC.vocab_size, (2, 8, 9), np.int32))
NESTED = ['shortgpt', 'taylor', 'ppl', 'sleb', 'magnitude', 'random']
# How near to PyTorch: absolute for cosines and angles, relative for sums over weights, perplexities and losses.
TOLERANCE = {
  'shortgpt': dict(rtol=0, atol=1e-4),
  'cosine_block': dict(rtol=0, atol=1e-4),
  'uidl': dict(rtol=0, atol=1e-4),
  'taylor': dict(rtol=1e-4),
  'ppl': dict(rtol=1e-4),
  'sleb': dict(rtol=1e-4),
}


METHODS = [name for name in ALL_METHODS if name not in ('auto', 'swaps', 'mask', 'elder', 'laco')]  # those that score


def choose(method, model, num_remove, batches=BATCHES, mode=Mode(), seed=0) -> Choice:
  return tiny.choose(method, model, num_remove, batches, mode, seed)


class Reference:
  """The formulas as published, in plain PyTorch, on what transformers' own model computes. CPU, float32."""

  def __init__(self, folder: pathlib.Path, tokens_BT: np.ndarray):
    import torch
    import transformers

    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    self.tokens_BT, self.layers = torch.tensor(tokens_BT.astype(np.int64)), self.model.model.layers
    self.kwargs, written = {}, []
    handles = [
      self.layers[0].register_forward_pre_hook(lambda m, a, kwargs: self.kwargs.update(kwargs), with_kwargs=True),
      # What transformers calls the last hidden state has gone through the final norm.
      self.layers[-1].register_forward_hook(lambda m, a, out: written.append(out)),
    ]
    with torch.no_grad():
      out = self.model.model(self.tokens_BT, output_hidden_states=True, use_cache=False)
    for handle in handles:
      handle.remove()
    self.x_MBTD = [*out.hidden_states[: len(self.layers)], *written]
    assert len(self.x_MBTD) == len(self.layers) + 1

  def cosine_BT(self, a_BTD, b_BTD):
    import torch

    return torch.nn.functional.cosine_similarity(a_BTD.double(), b_BTD.double(), dim=-1)

  def shortgpt(self):
    return [1 - self.cosine_BT(a, b).mean().item() for a, b in zip(self.x_MBTD, self.x_MBTD[1:])]

  def cosine_block(self, n):
    return [self.cosine_BT(a, b).mean().item() for a, b in zip(self.x_MBTD, self.x_MBTD[n:])]

  def uidl(self, n):
    import torch

    def angle(a, b):
      return torch.arccos(self.cosine_BT(a[:, -1], b[:, -1]).clamp(-1, 1)) / torch.pi

    return [angle(a, b).mean().item() for a, b in zip(self.x_MBTD, self.x_MBTD[n:])]

  def taylor(self):
    import torch

    for tokens_bT in self.tokens_BT.split(4):  # the graph of a few; gradients add up
      logits_bTV = self.model(tokens_bT, use_cache=False).logits[:, :-1]
      nll = torch.nn.functional.cross_entropy(logits_bTV.flatten(0, 1), tokens_bT[:, 1:].flatten(), reduction='sum')
      (nll / self.tokens_BT[:, 1:].numel()).backward()
    matrices = [[p for p in layer.parameters() if p.ndim == 2] for layer in self.layers]
    assert all(len(m) == 7 for m in matrices)
    return [sum((p.detach().double() * p.grad.double()).abs().sum().item() for p in m) for m in matrices]

  def stream(self, removed):
    """What each layer that is left reads, by layer."""
    import torch

    reads, x_BTD = {}, self.x_MBTD[0]
    with torch.no_grad():
      for l, layer in enumerate(self.layers):
        if l not in removed:
          reads[l] = x_BTD
          x_BTD = layer(x_BTD, **self.kwargs)
    return reads

  def loss_without(self, layer, removed, reads):
    """The mean LM loss without `layer` and without `removed`, of which `reads` is the stream."""
    import torch

    with torch.no_grad():
      x_BTD, total = reads[layer], 0.0
      for l in range(layer + 1, len(self.layers)):
        if l not in removed:
          x_BTD = self.layers[l](x_BTD, **self.kwargs)
      for x_TD, row_T in zip(x_BTD, self.tokens_BT):
        logits_TV = self.model.lm_head(self.model.model.norm(x_TD))[:-1]
        nll_T = logits_TV.logsumexp(-1) - logits_TV.gather(-1, row_T[1:, None])[:, 0]
        total += nll_T.sum().item()
    return total / self.tokens_BT[:, 1:].numel()


def ascending(scores, candidates) -> list[int]:
  return sorted(candidates, key=lambda l: scores[l])


def middle(num_layers: int) -> range:
  """Where Shortened LLaMA chooses: the first four and the last two blocks stay."""
  return range(4, num_layers - 2)


def compare_states_and_gradients(model: Decoder, batches, reference: Reference, n: int):
  """Of shortgpt, cosine_block, uidl and taylor: the scores, and the order of all layers or the run of n."""
  layers = range(model.num_layers)
  expected = {
    'shortgpt': reference.shortgpt(),
    'cosine_block': reference.cosine_block(n),
    'uidl': reference.uidl(n),
    'taylor': reference.taylor(),
  }
  sizes = {'shortgpt': len(layers), 'cosine_block': n, 'uidl': n, 'taylor': len(middle(len(layers)))}
  for method, size in sizes.items():
    choice = choose(method, model, size, batches, Mode())
    np.testing.assert_allclose(choice.scores, expected[method], **TOLERANCE[method], err_msg=method)
    if method in ('cosine_block', 'uidl'):
      assert len(choice.scores) == len(layers) + 1 - n
      start = int({'cosine_block': np.argmax, 'uidl': np.argmin}[method](expected[method]))
      assert choice.removed == list(range(start, start + n)), method
    else:
      candidates = middle(len(layers)) if method == 'taylor' else layers
      assert choice.removed == ascending(expected[method], candidates), method


def test_scores_equal_the_published_formulas(deep, deep_model):
  batches = list(np.random.default_rng(1).integers(0, 258, (3, 2, 17), np.int32))
  reference = Reference(deep, np.concatenate(batches))
  compare_states_and_gradients(deep_model, batches, reference, 3)

  one_gone = [reference.loss_without(l, [], reference.stream([])) for l in range(L)]
  choice = choose('ppl', deep_model, 3, batches, Mode())
  np.testing.assert_allclose(choice.scores, np.exp(one_gone), **TOLERANCE['ppl'])
  assert choice.removed == ascending(one_gone, middle(L))

  scores, removed = {}, []
  for _ in range(4):
    reads = reference.stream(removed)
    losses = {l: reference.loss_without(l, removed, reads) for l in reads}
    scores |= losses
    removed.append(min(losses, key=losses.get))
  choice = choose('sleb', deep_model, 4, batches, Mode())
  np.testing.assert_allclose(choice.scores, [scores[l] for l in range(L)], **TOLERANCE['sleb'])
  assert choice.removed == removed


@pytest.mark.slow
@pytest.mark.usefixtures('whole_compiler')
def test_scores_of_smollm2_equal_the_published_formulas(tmp_path):
  """4 sequences of 128 tokens from the start of a text."""
  source = open_source(str(GGUF), tmp_path / 'scratch')
  model = load_model(source, 'float32')
  folder = tmp_path / 'whole'
  folder.mkdir()
  save_model(pieces_of_model(model), source, list(range(30)), folder, 'float32', int(5e9))
  tokens = data.load_tokenizer(str(folder))(NEWS.read_text())['input_ids'][: 4 * 128]
  tokens_BT = np.array(tokens, np.int32).reshape(4, 128)
  batches = [tokens_BT[:2], tokens_BT[2:]]
  reference = Reference(folder, tokens_BT)
  compare_states_and_gradients(model, batches, reference, 7)

  # ppl computes what the first step of sleb does, and gets it from there: a minute less. Later steps: the test above.
  steps, compute = [], _loss_without_each

  def once(*args):
    if not steps:
      steps.append(compute(*args))
    return steps[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ablation_module, '_loss_without_each', once)
    greedy = choose('sleb', model, 1, batches, Mode())
    one_shot = choose('ppl', model, len(middle(30)), batches, Mode())
  losses = [reference.loss_without(l, [], reference.x_MBTD) for l in range(30)]
  np.testing.assert_allclose(greedy.scores, losses, **TOLERANCE['sleb'])
  np.testing.assert_allclose(one_shot.scores, np.exp(losses), **TOLERANCE['ppl'])
  assert greedy.removed == [int(np.argmin(losses))] and one_shot.removed == ascending(losses, middle(30))


@pytest.fixture(scope='module')
def deep(tmp_path_factory) -> pathlib.Path:
  """A tiny Llama of nine layers: Shortened LLaMA keeps six of them."""
  from tiny import write_tiny_llama

  return write_tiny_llama(tmp_path_factory.mktemp('deep'), num_hidden_layers=L)


@pytest.fixture(scope='module')
def deep_model(deep) -> Decoder:
  return load_model(open_source(str(deep), deep / 'scratch'), 'float32')


@pytest.fixture(scope='module')
def trained() -> Decoder:
  """A model whose layers all serve BATCHES: to remove any of them costs LM loss."""
  settings = TrainSettings(steps=40, lr=5e-3, lambda2=0.0)
  model = Decoder(SPEC, L, jax.random.key(0))
  return train(model, [], settings, Mode(), Endless(lambda i: BATCHES[i % 2]))


def without_effect(model: Decoder, *layers: int) -> Decoder:
  """A copy in which these layers' updates are exactly 0."""
  model = jax.tree.map(lambda a: a, model)
  for param in (model.layers.wo, model.layers.w_down):
    param.set_value(param.get_value().at[np.array(layers)].set(0.0))
  return model


@pytest.mark.parametrize('method', ['shortgpt', 'ppl', 'sleb', 'taylor', 'uidl', 'cosine_block'])
def test_a_layer_without_effect_goes_first(trained, method):
  assert choose(method, without_effect(trained, 5), 1).removed == [5]


def test_what_a_layer_without_effect_scores(trained):
  model = without_effect(trained, 5, 4)
  windows = perplexity_lib.Windows(np.concatenate(BATCHES), {})
  dense = perplexity_lib.perplexity(model, windows, Mode(), 8)
  for method, value in {'shortgpt': 0, 'taylor': 0, 'uidl': 0, 'ppl': dense, 'sleb': np.log(dense)}.items():
    choice = choose(method, model, 1)
    np.testing.assert_allclose([choice.scores[4], choice.scores[5]], value, rtol=1e-6, atol=3e-7, err_msg=method)
    assert min(choice.scores) == min(choice.scores[4:6]), method
  # Exactly equal scores: the lower number goes first.
  assert choose('taylor', model, 2).removed == choose('sleb', model, 2).removed == [4, 5]
  assert choose('uidl', model, 1).removed == [4] and choose('uidl', model, 2).removed == [4, 5]


@pytest.mark.parametrize('method', NESTED)
def test_fewer_layers_are_the_first_of_more(trained, method):
  most = choose(method, trained, 3).removed
  assert len(set(most)) == 3
  for n in (1, 2):
    assert choose(method, trained, n).removed == most[:n]


def test_one_shot_scores_do_not_depend_on_how_many_go(trained):
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
  batches = [batch[:3] for batch in BATCHES]  # a shape that no other test has
  before = compiled()
  choose('sleb', trained, 4, batches, Mode())
  choose('ppl', trained, 2, batches, Mode())
  assert compiled() == before + 1


def test_magnitude_sums_the_matrices():
  model = Decoder(SPEC, L, jax.random.key(1))
  matrices = [np.asarray(getattr(model.layers, n)[...]) for n in 'wq wk wv wo w_gate w_up w_down'.split()]
  expected_L = sum(np.abs(a).sum(tuple(range(1, a.ndim)), dtype=np.float64) for a in matrices)
  choice = choose('magnitude', model, L)
  np.testing.assert_allclose(choice.scores, expected_L, rtol=1e-6)
  assert choice.removed == ascending(expected_L, range(L))


def test_random_depends_on_the_seed_alone(trained):
  orders = [choose('random', trained, L, seed=s).removed for s in range(5)]
  assert all(sorted(order) == list(range(L)) for order in orders)
  assert len({tuple(order) for order in orders}) == 5
  assert choose('random', Decoder(SPEC, L, jax.random.key(3)), L, seed=3).removed == orders[3]


def test_last_spares_the_very_last(trained):
  assert choose('last', trained, 3) == Choice([5, 6, 7], [])
  assert choose('last', trained, L - 1).removed == list(range(L - 1))


@pytest.mark.parametrize('method', METHODS)
def test_the_cut_into_batches_and_the_gates_change_nothing(trained, method):
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
  # The gradients of a trained model all but cancel between tokens, and bfloat16 with them.
  atol = 0.15 if method == 'taylor' else 0.03
  np.testing.assert_allclose(np.array(choice.scores) / scale, np.array(expected.scores) / scale, atol=atol)


def test_nothing_to_remove(trained):
  for method in METHODS:
    assert choose(method, trained, 0) == Choice([], [])


@pytest.mark.parametrize('method, most', [(m, {'taylor': 3, 'ppl': 3, 'last': L - 1}.get(m, L)) for m in METHODS])
def test_more_than_there_are_to_choose_from(trained, method, most):
  with pytest.raises(InputError, match=rf'method={method}: may choose from {most} of the 9 layers, {most + 1} are'):
    choose(method, trained, most + 1)


def test_too_few_layers_for_the_ends_that_stay():
  for method in ('taylor', 'ppl'):
    with pytest.raises(InputError, match=rf'method={method}: may choose from 0 of the 5 layers, 1 are'):
      choose(method, Decoder(SPEC, 5, jax.random.key(0)), 1)


def test_an_unknown_method():
  with pytest.raises(InputError, match='method=best: is not known; choose one of: auto, swaps, mask, elder, '):
    choose('best', Decoder(SPEC, L, jax.random.key(0)), 1)


def test_scores_that_are_not_finite(trained):
  model = jax.tree.map(lambda a: a, trained)
  model.layers.wq.set_value(model.layers.wq.get_value().at[2].set(np.nan))
  for method in ('shortgpt', 'taylor', 'ppl', 'uidl', 'magnitude'):
    with pytest.raises(InputError, match=rf'method={method}: some scores are not finite'):
      choose(method, model, 1)


def test_eight_devices_choose_as_one_does(eight_devices):
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
