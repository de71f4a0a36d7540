"""A random decoder with gates, and its forward pass as a plain Python loop over the layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.model import pruning
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.layers import Block
from elder_jax.model.layers import rms_norm
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.training.penalty import measure_of

SPEC = Spec(
  vocab_size=37,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  d_ff=20,
  norm_eps=1e-5,
  tied=False,
  rope_freq_RH=((1.0, 0.3, 0.05),),
)
LAYERS = 5
B, T = 2, 11
ALL_NORMS = [(p, s) for p in ('l2', 'l1') for s in ('token', 'relative', 'none')]


@functools.cache
def decoder(tied: bool = False) -> Decoder:
  """A random Decoder. The scales of norms are random too, so that swapping them would be noticed. Do not change it."""

  @jax.jit
  def make():
    model = Decoder(dataclasses.replace(SPEC, tied=tied), LAYERS, jax.random.key(1))
    for i, norm in enumerate((model.layers.attn_norm.scale, model.layers.mlp_norm.scale, model.final_norm.scale)):
      norm.set_value(jax.random.uniform(jax.random.key(10 + i), norm.get_value().shape, minval=0.5, maxval=1.5))
    return model

  return make()


def with_gates(model: Decoder, gates) -> Decoder:
  model = pruning.with_gates(model, 1.0)
  model.gate_L.set_value(jnp.array(gates, jnp.float32))
  return model


def tokens(batch: int = B, length: int = T, vocab: int = SPEC.vocab_size, seed: int = 0):
  return np.random.default_rng(seed).integers(0, vocab, (batch, length), np.int32)


def alive_without(*skipped):
  return np.array([l not in skipped for l in range(LAYERS)])


def layer_of(model: Decoder, l: int) -> Block:
  return jax.tree.map(lambda a: a[l], model.layers)


@functools.partial(jax.jit, static_argnames='mode')
def forward_jit(model, tokens_BT, alive_L=None, mode=Mode()):
  x_BTD, delta_L = forward(model, tokens_BT, alive_L, mode, measure=measure_of(mode))
  return x_BTD, delta_L, logits_of(model, x_BTD)


@jax.jit
def layer_jit(block, x_BTD, rope):
  return block(x_BTD, jnp.float32(1), rope, Mode(gate='residual'))[0]


def by_hand(model: Decoder, tokens_BT, alive_L, mode: Mode):
  """forward as a Python loop, with the norms of the updates in NumPy."""
  x_BTD = model.embed[...][tokens_BT]
  rope, _ = rope_and_window(model.spec, rope_tables(model.spec, tokens_BT.shape[1]), {})
  delta_L = []
  for l in range(model.num_layers):
    if not alive_L[l]:
      delta_L.append(0.0)
      continue
    # f(x) of the paper: the output of the layer without a gate. Both forms of gates follow from it.
    f_BTD = layer_jit(layer_of(model, l), x_BTD, rope)
    gate = model.gate_L[...][l]
    delta_L.append(plain_norm(np.asarray(f_BTD - x_BTD), np.asarray(x_BTD), mode.penalty, mode.penalty_scale))
    x_BTD = gate * f_BTD if mode.gate == 'output' else x_BTD + gate * (f_BTD - x_BTD)
  return rms_norm(x_BTD, model.final_norm.scale[...], model.spec.norm_eps), np.array(delta_L)


def plain_norm(d_BTD, x_BTD, penalty, scale):
  order = {'l1': 1, 'l2': 2}[penalty]
  if scale == 'none':
    return np.linalg.norm(d_BTD.ravel(), order)
  size_BT = np.linalg.norm(d_BTD, order, axis=-1)
  if scale == 'relative':
    size_BT = size_BT / np.linalg.norm(x_BTD, order, axis=-1)
  return size_BT.mean()
