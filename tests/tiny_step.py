"""Shared by the tests of training: a tiny model, its batches, and a step that is compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_spec

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import init_state
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask

SPEC = tiny_spec(tied=False)
L = 3
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (8, 4, 9), np.int32)
TRACES = []


def rate(step):
  TRACES.append(step)  # counts how often a step is traced
  return 0.01 + 0.0 * step


@functools.cache
def random_model() -> Decoder:
  return Decoder(SPEC, L, jax.random.key(0))


def tiny(dtype=jnp.float32) -> Decoder:
  def to_dtype(path, a):
    return a if 'gate_L' in jax.tree_util.keystr(path) else a.astype(dtype)

  return jax.tree_util.tree_map_with_path(to_dtype, random_model())


def terms(**more) -> dict:
  return {
    'alive_L': np.ones(L, bool),
    'gate_weight_L': np.full(L, 0.01, np.float32),
    'delta_weight_L': np.full(L, 0.1, np.float32),
  } | more


@functools.cache
def adam_step(what: str, dtype: str = 'float32'):
  """Returns (tx, step), compiled once for all tests."""
  tx = make_optimizer(train_mask(tiny(), what), rate, 0.0, 1.0)
  return tx, make_step(tx, Mode(dtype=dtype), 1, rate)


def begin(what: str, model: Decoder | None = None, dtype: str = 'float32'):
  model = tiny() if model is None else model
  tx, step = adam_step(what, dtype)
  return step, *init_state(model, train_mask(model, what), tx)
