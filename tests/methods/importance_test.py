"""The scores of the published methods against their formulas in PyTorch."""

import pathlib

import numpy as np
import pytest
from rivals import L
from rivals import ascending
from rivals import choose
from rivals import middle
from tiny import write_tiny_llama

from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import open_source
from elder_jax.methods import ablation as ablation_module
from elder_jax.methods.ablation import _loss_without_each
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.text import data

ASSETS = pathlib.Path('~/.cache/elder_jax').expanduser()
GGUF = ASSETS / 'SmolLM2-135M-Instruct.Q4_1.gguf'
NEWS = ASSETS / 'lee_news.txt'
# Tolerance against PyTorch: absolute for cosines and angles, relative for sums over weights, perplexities and losses.
TOLERANCE = {
  'shortgpt': dict(rtol=0, atol=1e-4),
  'cosine_block': dict(rtol=0, atol=1e-4),
  'uidl': dict(rtol=0, atol=1e-4),
  'taylor': dict(rtol=1e-4),
  'ppl': dict(rtol=1e-4),
  'sleb': dict(rtol=1e-4),
}


class Reference:
  """The published formulas in plain PyTorch, on the hidden states of the transformers model. CPU, float32."""

  def __init__(self, folder: pathlib.Path, tokens_BT: np.ndarray):
    import torch
    import transformers

    self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    self.tokens_BT, self.layers = torch.tensor(tokens_BT.astype(np.int64)), self.model.model.layers
    self.kwargs, written = {}, []
    handles = [
      self.layers[0].register_forward_pre_hook(lambda m, a, kwargs: self.kwargs.update(kwargs), with_kwargs=True),
      # In transformers the last hidden state is taken after the final norm, so the last layer needs a hook.
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

    for tokens_bT in self.tokens_BT.split(4):  # small graphs; the gradients add up
      logits_bTV = self.model(tokens_bT, use_cache=False).logits[:, :-1]
      nll = torch.nn.functional.cross_entropy(logits_bTV.flatten(0, 1), tokens_bT[:, 1:].flatten(), reduction='sum')
      (nll / self.tokens_BT[:, 1:].numel()).backward()
    matrices = [[p for p in layer.parameters() if p.ndim == 2] for layer in self.layers]
    assert all(len(m) == 7 for m in matrices)
    return [sum((p.detach().double() * p.grad.double()).abs().sum().item() for p in m) for m in matrices]

  def stream(self, removed):
    """Returns {layer: its input} for the remaining layers."""
    import torch

    reads, x_BTD = {}, self.x_MBTD[0]
    with torch.no_grad():
      for l, layer in enumerate(self.layers):
        if l not in removed:
          reads[l] = x_BTD
          x_BTD = layer(x_BTD, **self.kwargs)
    return reads

  def loss_without(self, layer, removed, reads):
    """Returns the mean LM loss without `layer` and `removed`. reads: the result of `stream(removed)`."""
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


def compare_states_and_gradients(model: Decoder, batches, reference: Reference, n: int):
  """Checks the scores of shortgpt, cosine_block, uidl and taylor, and the order of the layers or the block of n."""
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

  # ppl reuses the result of sleb's first step, which is the same: this saves a minute. The test above has later steps.
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
  """A tiny Llama with nine layers, six of which Shortened LLaMA never removes."""
  return write_tiny_llama(tmp_path_factory.mktemp('deep'), num_hidden_layers=L)


@pytest.fixture(scope='module')
def deep_model(deep) -> Decoder:
  return load_model(open_source(str(deep), deep / 'scratch'), 'float32')
