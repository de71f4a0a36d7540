"""Attention, rotary position embeddings (RoPE) and sliding windows.

Dimension names: see decoder.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model import products
from elder_jax.model import splash
from elder_jax.model.spec import Spec

QUERY_BLOCK = {'cpu': 128, 'tpu': 512}  # queries per block where there is no fused kernel


def softcap(a, cap: float | None):
  return a if cap is None else cap * jnp.tanh(a / cap)


def kinds(spec: Spec) -> dict:
  """Returns the properties in which layers differ, as int32_L to scan over; empty if all layers are alike."""
  window_L = [w or NO_WINDOW for w in spec.window_L]
  of_layers = {'rope': spec.rope_L, 'window': window_L, 'mixer': spec.mixer_L}
  return {k: np.array(a, np.int32) for k, a in of_layers.items() if len(set(a)) > 1}


def rope_and_window(spec: Spec, tables, kind: dict):
  """Returns a layer's (cos_TH, sin_TH) from rope_tables, and its window or None. kind: its part of `kinds`."""
  row = kind.get('rope', spec.rope_L[0] if spec.rope_L else 0)
  window = kind.get('window', spec.window_L[0] or None if spec.window_L else None)
  return tuple(table_RTH[row] for table_RTH in tables), window


def mixer_of(spec: Spec, kind: dict):
  """Returns 0 or 1, as in Spec.mixer_L. kind: the layer's part of `kinds`."""
  return kind.get('mixer', spec.mixer_L[0] if spec.mixer_L else 0)


HIDDEN = -1e30  # the score of a key that a query does not see; finite, so that a row without keys gives no NaN
NO_WINDOW = 2**30  # the window of full attention in models where layers differ


def rope_tables(spec: Spec, num_tokens: int, length=None):
  """Returns (cos_RTH, sin_RTH) for the positions 0 … num_tokens − 1, in float32. H is half of the rotated dimensions.

  Args:
    length: Number of tokens without padding; None: num_tokens. It may be traced.
  """
  return _tables(spec, jnp.arange(num_tokens), (num_tokens if length is None else length) > spec.rope_near)


def rope_at(spec: Spec, position_T):
  """Returns the rows of rope_tables for any positions, each as for a text that ends at that position."""
  return _tables(spec, position_T, (position_T >= spec.rope_near)[None, :, None])


def _tables(spec: Spec, position_T, is_far):
  """is_far: Whether spec.rope_far_RH applies: one bool, or [1, T, 1]."""
  freq_RTH = jnp.array(spec.rope_freq_RH, jnp.float32)[:, None]
  if spec.rope_far_RH:
    freq_RTH = jnp.where(is_far, jnp.array(spec.rope_far_RH, jnp.float32)[:, None], freq_RTH)
  angle_RTH = position_T.astype(jnp.float32)[None, :, None] * freq_RTH
  cos_RTH, sin_RTH = jnp.cos(angle_RTH), jnp.sin(angle_RTH)
  if not spec.rope_scale_R:
    return cos_RTH, sin_RTH
  scale_R11 = jnp.array(spec.rope_scale_R, jnp.float32)[:, None, None]
  return cos_RTH * scale_R11, sin_RTH * scale_R11


def apply_rope(x_BTNH, rope, pairs: bool = False):
  """Rotates the first R dimensions of each head in float32.

  Args:
    pairs: Which dimensions form a pair. False: (i, i + R/2), the layout of Hugging Face. True: (2i, 2i + 1).
  """
  cos, sin = (table_TH[None, :, None, :] for table_TH in rope)
  half, H = cos.shape[-1], x_BTNH.shape[-1]
  if not half:
    return x_BTNH
  turned = x_BTNH[..., : 2 * half].astype(jnp.float32)
  a, b = (turned[..., 0::2], turned[..., 1::2]) if pairs else jnp.split(turned, 2, axis=-1)
  both = a * cos - b * sin, b * cos + a * sin
  rotated = jnp.stack(both, -1).reshape(turned.shape) if pairs else jnp.concatenate(both, -1)
  rotated = rotated.astype(x_BTNH.dtype)
  return rotated if 2 * half == H else jnp.concatenate([rotated, x_BTNH[..., 2 * half :]], -1)


def attention(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  window=None,
  scale: float | None = None,
  cap: float | None = None,
  sink_N=None,
  window_L: tuple[int, ...] = (),
):
  """Returns causal attention, [B, T, N, H]. Query head n reads key/value head n // (N/K).

  Uses a fused kernel where it can: cuDNN's on a GPU, splash attention on a TPU.

  Args:
    window: Number of last tokens, its own included, that a token attends to: an int, an int32 scalar, or None for all.
    scale: Factor of the scores; None: H ** -0.5.
    cap: Scores s become cap · tanh(s / cap).
    sink_N: Attention sinks: an additional score per head in the softmax, without a value.
    window_L: The values that a traced window can have, as in Spec. A kernel needs a window that is not traced.
  """
  T = q_BTNH.shape[1]
  kernel, static = _kernel(q_BTNH, cap, sink_N), window is None or isinstance(window, int)
  if kernel and not static and window_L:

    def with_window(w: int):
      return lambda q, k, v: attention(q, k, v, w, scale, cap, sink_N)

    windows = sorted({min(w or T, T) for w in window_L})
    index = jnp.searchsorted(jnp.array(windows), jnp.minimum(window, T))
    return jax.lax.switch(index, [with_window(w) for w in windows], q_BTNH, k_BTKH, v_BTKH)
  if kernel == 'splash' and static:
    return splash.attention(q_BTNH, k_BTKH, v_BTKH, window, scale, cap, sink_N)
  if kernel and static:
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      is_causal=True,
      scale=scale,
      local_window_size=None if window is None or window >= T else (window - 1, 0),
      implementation='cudnn' if kernel == 'cudnn' else 'xla',
    )
  # Without a fused kernel: blocks of queries skip the keys after them, which halves the time of the full matrix.
  size = QUERY_BLOCK.get(sharding.platform(), T)
  blocks = []
  for start in range(0, T, size):
    end = min(T, start + size)
    first = max(0, start - window + 1) if isinstance(window, int) else 0
    back_ts = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None]
    seen_ts = back_ts >= 0 if window is None else (back_ts >= 0) & (back_ts < window)
    blocks.append(
      masked_attention(
        q_BTNH[:, start:end], k_BTKH[:, first:end], v_BTKH[:, first:end], seen_ts[None, None], scale, cap, sink_N
      )
    )
  return jnp.concatenate(blocks, axis=1)


def _kernel(q_BTNH, cap, sink_N) -> str:
  """The kernel that computes attention on this device: splash, cudnn, xla (its own for a GPU), or none, as ''."""
  backend, T, H = sharding.platform(), q_BTNH.shape[1], q_BTNH.shape[-1]
  if backend == 'tpu':
    return 'splash' if splash.can(T, H) else ''
  if backend != 'gpu' or cap is not None or sink_N is not None:
    return ''
  of_cudnn = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and H <= 128 and H % 8 == 0  # on all GPUs that it supports
  return 'cudnn' if of_cudnn else 'xla'


def masked_attention(
  q_BTNH, k_BSKH, v_BSKH, seen_BNTS, scale: float | None = None, cap: float | None = None, sink_N=None
):
  """Returns attention with a mask, [B, T, N, H]. seen_BNTS: True where a query attends to a key; broadcastable."""
  if cap is None and sink_N is None and sharding.platform() != 'cpu':
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=seen_BNTS, scale=scale, implementation='xla')
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  scale = H**-0.5 if scale is None else scale
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = products.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, jnp.float32) * scale
  score_BKGTS = jnp.where(seen_BNTS[:, :, None], softcap(score_BKGTS, cap), HIDDEN)
  if sink_N is None:
    p_BKGTS = jax.nn.softmax(score_BKGTS, -1).astype(v_BSKH.dtype)
  else:
    sink_BKGT1 = jnp.broadcast_to(sink_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1), (*score_BKGTS.shape[:-1], 1))
    p_BKGTS = jax.nn.softmax(jnp.concatenate([score_BKGTS, sink_BKGT1], -1), -1)[..., :-1].astype(v_BSKH.dtype)
  return products.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH).reshape(B, T, N, H)
