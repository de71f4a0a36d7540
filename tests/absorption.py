"""Shared by the tests of absorb: a few batches, and the inputs and outputs of layers in NumPy."""

import functools

import jax
import numpy as np

from elder_jax.model.attention import attention
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.recipes import absorb

L = 6
BATCHES = list(np.random.default_rng(0).integers(0, 40, (3, 4, 16), np.int32))
# Refits only the down projection of the layer before each gap.
ONE_MATRIX = functools.partial(absorb.absorb, after=0, attention=False)


def streams(model, tokens_BT) -> np.ndarray:
  """Returns the input of each layer and the output of the last, [L + 1, tokens, D]."""
  x_BTD, _, x_LBTD = run_layers(model, embed(model, tokens_BT), inputs=True)
  x_MBTD = np.concatenate([x_LBTD, x_BTD[None]]).astype(np.float64)
  return x_MBTD.reshape(len(x_MBTD), -1, 16)


def features(model, l, tokens_BT) -> np.ndarray:
  """Returns the input of layer l's down projection, computed in NumPy."""
  x_BTD = run_layers(model, embed(model, tokens_BT), inputs=True)[2][l]
  block = jax.tree.map(lambda a: a[l], model.layers)
  rope, _ = rope_and_window(model.spec, rope_tables(model.spec, 16), {})
  mid_BTD = x_BTD + block.attn_update(attention(*block.qkv(x_BTD, rope)), x_BTD)
  h = np.asarray(mid_BTD, np.float64)
  scale_D = np.asarray(block.mlp_norm.scale[...]) + (model.spec.norm == 'rms1')
  h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5) * scale_D
  gate = h @ np.asarray(block.w_gate[...])
  return ((gate / (1 + np.exp(-gate))) * (h @ np.asarray(block.w_up[...]))).reshape(-1, 24)


def w_down(model, l) -> np.ndarray:
  return np.asarray(model.layers.w_down[...][l], np.float64)
