"""Perplexity against a plain computation, and its windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elder_jax.errors import InputError
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.text.data import Corpus

V = 40
SPEC = Spec(
  vocab_size=V,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)


@functools.cache
def random_model() -> Decoder:
  return Decoder(SPEC, 3, jax.random.key(0))


@jax.jit
def all_logits(model, tokens_BT):
  return logits_of(model, forward(model, tokens_BT)[0])


def corpus(length: int) -> Corpus:
  return Corpus('text.txt', 'sha', np.random.default_rng(length).integers(1, V, length, np.int32))


def sharp() -> Decoder:
  """A model far from uniform, so that windows differ and a wrong mean is detected."""
  model = jax.tree.map(lambda a: a, random_model())
  model.embed.set_value(8 * model.embed.get_value())
  return model


def plain(model, tokens_NT) -> float:
  nlls = []
  for tokens_T in tokens_NT:
    logits_TV = np.asarray(all_logits(model, tokens_T[None]), np.float64)[0, :-1]
    logits_TV -= logits_TV.max(-1, keepdims=True)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    nlls.append(-logp_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]])
  return float(np.exp(np.concatenate(nlls).mean()))


@pytest.mark.parametrize('batch_size', [2, 5, 8])
def test_perplexity_equals_the_plain_computation_for_any_batch_size(batch_size):
  text, model = corpus(5 * 9 + 4), sharp()
  windows = perplexity_lib.make_windows(text, '--eval_data=x', 9, 0, 'tokenizer', None)
  done = []
  ppl = perplexity_lib.perplexity(model, windows, Mode(), batch_size, progress=lambda i, of: done.append((i, of)))
  expected = plain(model, text.tokens_N[:45].reshape(5, 9))  # the rest is dropped
  np.testing.assert_allclose(ppl, expected, rtol=1e-5)
  assert abs(plain(model, text.tokens_N[:36].reshape(4, 9)) / expected - 1) > 1e-2  # the last window matters
  assert done == [(min(i, 5), 5) for i in range(batch_size, 5 + batch_size, batch_size)]


def test_perplexity_uses_the_gates_of_the_model():
  windows = perplexity_lib.make_windows(corpus(45), '--eval_data=x', 9, 0, 'none', None)
  model = sharp()
  model.gate_L.set_value(jnp.array([1, 0.5, 0], jnp.float32))
  ppl = perplexity_lib.perplexity(model, windows, Mode(), 5)
  np.testing.assert_allclose(ppl, plain(model, windows.tokens_NT), rtol=1e-5)
  assert abs(ppl / plain(sharp(), windows.tokens_NT) - 1) > 1e-3


@pytest.mark.parametrize('bos', ['tokenizer', 'window'])
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(bos):
  model = jax.tree.map(lambda a: a, random_model())
  model.embed.set_value(jnp.zeros_like(model.embed.get_value()))
  windows = perplexity_lib.make_windows(corpus(30), '--eval_data=x', 9, 0, bos, 0)
  np.testing.assert_allclose(perplexity_lib.perplexity(model, windows, Mode(), 2), V, rtol=1e-6)


def test_windows_are_consecutive_and_the_remainder_is_dropped():
  text = corpus(49)
  windows = perplexity_lib.make_windows(text, '--eval_data=x', 9, 0, 'tokenizer', None)
  np.testing.assert_array_equal(windows.tokens_NT, text.tokens_N[:45].reshape(5, 9))
  assert windows.about == {
    'source': 'text.txt',
    'sha256': 'sha',
    'window': 9,
    'windows': 5,
    'tokens_predicted': 40,
    'bos': 'tokenizer',
    'protocol': perplexity_lib.PROTOCOL,
  }


def test_bos_is_part_of_the_window():
  text = corpus(49)
  windows = perplexity_lib.make_windows(text, '--eval_data=x', 9, 0, 'window', 0)
  assert windows.tokens_NT.shape == (6, 9) and (windows.tokens_NT[:, 0] == 0).all()
  np.testing.assert_array_equal(windows.tokens_NT[:, 1:], text.tokens_N[:48].reshape(6, 8))
  assert windows.tokens_NT.dtype == np.int32
  about = windows.about
  assert (about['window'], about['windows'], about['tokens_predicted'], about['bos']) == (9, 6, 48, 'window')
  model = sharp()
  np.testing.assert_allclose(
    perplexity_lib.perplexity(model, windows, Mode(), 5), plain(model, windows.tokens_NT), rtol=1e-5
  )


@pytest.mark.parametrize('max_tokens, count', [(0, 5), (18, 2), (20, 2), (9, 1), (1000, 5)])
def test_max_tokens_keeps_the_first_tokens(max_tokens, count):
  text = corpus(49)
  windows = perplexity_lib.make_windows(text, '--eval_data=x', 9, max_tokens, 'none', None)
  np.testing.assert_array_equal(windows.tokens_NT, text.tokens_N[: 9 * count].reshape(count, 9))
  assert windows.about['windows'] == count and windows.about['tokens_predicted'] == 8 * count


def test_a_text_shorter_than_a_window_is_refused():
  with pytest.raises(InputError, match='eval_data=x.*8 tokens.*--eval_seq_len=9'):
    perplexity_lib.make_windows(corpus(8), '--eval_data=x', 9, 0, 'tokenizer', None)
