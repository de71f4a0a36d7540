"""Sampling a token from logits: truncation by top_k and top_p, and the resulting probabilities."""

import jax
import numpy as np
import pytest

from elder_jax.text.decoding import Sampling
from elder_jax.text.decoding import sample
from elder_jax.text.decoding import truncate

# Probabilities, deliberately unsorted.
P_V = np.array([0.2, 0.4, 0.1, 0.3])


@pytest.mark.parametrize(
  'top_k, top_p, kept',
  [
    (0, 1.0, {0, 1, 2, 3}),
    (2, 1.0, {1, 3}),
    (9, 1.0, {0, 1, 2, 3}),
    (0, 0.3, {1}),
    (0, 0.39, {1}),
    (0, 0.41, {1, 3}),
    (0, 0.69, {1, 3}),
    (0, 0.71, {0, 1, 3}),
    (0, 0.91, {0, 1, 2, 3}),
    (0, 1e-9, {1}),
    (2, 0.56, {1}),  # top_k leaves probabilities 4/7 and 3/7
    (2, 0.6, {1, 3}),
  ],
)
def test_truncation_of_known_probabilities(top_k, top_p, kept):
  logits_BV = np.log(np.stack([P_V, P_V[::-1]])).astype(np.float32)
  out_BV = np.asarray(jax.jit(truncate, static_argnums=(1, 2))(logits_BV, top_k, top_p))
  assert set(np.flatnonzero(np.isfinite(out_BV[0]))) == kept
  assert set(np.flatnonzero(np.isfinite(out_BV[1]))) == {3 - v for v in kept}
  np.testing.assert_array_equal(out_BV[np.isfinite(out_BV)], logits_BV[np.isfinite(out_BV)])


@pytest.mark.parametrize('top_k, top_p', [(0, 0.9), (7, 1.0), (20, 0.5)])
def test_truncation_equals_transformers(top_k, top_p):
  import torch
  import transformers

  logits_BV = 3 * np.random.default_rng(0).standard_normal((16, 100), np.float32)
  expected = torch.tensor(logits_BV)
  if top_k:
    expected = transformers.TopKLogitsWarper(top_k)(None, expected)
  if top_p < 1:
    expected = transformers.TopPLogitsWarper(top_p)(None, expected)
  np.testing.assert_array_equal(truncate(logits_BV, top_k, top_p), expected.numpy())


@pytest.mark.parametrize(
  'sampling, expected_V',
  [
    (Sampling(1.0), P_V),
    (Sampling(0.5), P_V**2 / (P_V**2).sum()),
    (Sampling(1.0, top_p=0.6), np.array([0, 4, 0, 3]) / 7),
    (Sampling(1.0, top_k=3), np.array([2, 4, 0, 3]) / 9),
  ],
)
def test_tokens_are_sampled_with_their_probabilities(sampling, expected_V):
  n = 20_000
  logits_BV = np.tile(np.log(P_V).astype(np.float32) + 5, (n, 1))
  token_B = jax.jit(sample, static_argnums=2)(logits_BV, jax.random.split(jax.random.key(0), n), sampling)
  share_V = np.bincount(token_B, minlength=4) / n
  np.testing.assert_allclose(share_V, expected_V, atol=0.015)  # four standard deviations
  assert (share_V[expected_V == 0] == 0).all()
