"""Causal attention by splash attention, the Pallas kernel of jax for TPUs: it never holds the scores of all pairs.

Dimension names: see decoder.py.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from elder_jax.devices import sharding

BLOCKS = (512, 256, 128)  # tokens of a block: the largest that divides the text; the kernel takes multiples of 128


def can(num_tokens: int, head_dim: int) -> bool:
  """Whether the kernel takes these sizes."""
  return num_tokens % BLOCKS[-1] == 0 and head_dim % 64 == 0


def attention(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  window: int | None = None,
  scale: float | None = None,
  cap: float | None = None,
  sink_N=None,
  interpret: bool = False,
):
  """Returns causal attention, [B, T, N, H]. Arguments as in attention.attention.

  Args:
    interpret: Whether to run the kernel step by step, on any device.
  """
  # Imported here: it takes a quarter of a second, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  B, T, _, H = q_BTNH.shape
  scale = H**-0.5 if scale is None else scale
  q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
  size = next(n for n in BLOCKS if T % n == 0)
  local = window is not None and window < T

  def of_device(q_BNTH, k_BKTH, v_BKTH, *sink_N):
    """The batch rows and heads of one device."""
    shape = (T, T)
    mask = splash.LocalMask(shape, (window - 1, 0), offset=0) if local else splash.CausalMask(shape)
    kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * q_BNTH.shape[1]),
      block_sizes=splash.BlockSizes(size, size, size, size, size, size, size, size),
      attn_logits_soft_cap=cap,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
    )
    return jax.vmap(lambda q, k, v: kernel(q, k, v, None, *sink_N))(q_BNTH, k_BKTH, v_BKTH)

  args = tuple(a.swapaxes(1, 2) for a in (q_BTNH, k_BTKH, v_BTKH))
  args += () if sink_N is None else (sink_N.astype(jnp.float32),)
  if sharding.mesh_sizes():
    # The compiler cannot partition a kernel.
    heads = P(sharding.batch_axes(B), 'tp')
    specs = (heads,) * 3 + (P('tp'),) * (sink_N is not None)
    of_device = jax.shard_map(of_device, in_specs=specs, out_specs=heads, check_vma=False)
  return of_device(*args).swapaxes(1, 2)
