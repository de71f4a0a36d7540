"""Shared by the tests of LoRA: a tiny model, its batches, and the sizes of the factors."""

import functools

import jax
import numpy as np
from tiny import tiny_spec

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Spec

L, RANK, ALPHA = 3, 2, 6.0
SPEC = tiny_spec()
MATRICES = {'wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'}
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (8, 4, 9), np.int32)


@functools.cache
def random_model(spec: Spec = SPEC) -> Decoder:
  return Decoder(spec, L, jax.random.key(0))
