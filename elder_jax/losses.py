"""The one loss of both stages: language modelling + gate L1 + penalty on the updates of layers that will go.

Dimension names: see model.py.
"""

import jax
import jax.numpy as jnp

from elder_jax import model as model_lib

CHUNK_TOKENS = 1024  # of a batch, whose float32 logits are alive at a time


def next_token_nll(model, x_BTD, tokens_BT, weight_BT=None):
  """Sum over tokens of −log p(next token), float32, and the number of tokens summed (their weights' sum).

  Goes through the sequence in chunks and computes each chunk's logits again in the backward pass: [B, T, V] is never
  in memory. Chunks are cut along T, so that a batch that is sharded over devices stays so.

  Args:
    x_BTD: forward's hidden states.
    tokens_BT: the tokens that were read; position t is asked for tokens[t + 1], the last for nothing.
    weight_BT: 0 for a position whose next token is not to be counted; None counts all.
  """
  B, T = tokens_BT.shape
  head_VD = (model.embed if model.head is None else model.head)[...].astype(x_BTD.dtype)
  counted_BT = jnp.broadcast_to(jnp.arange(T)[None] < T - 1, (B, T)).astype(jnp.float32)
  if weight_BT is not None:
    counted_BT = counted_BT * weight_BT
  target_BT = jnp.roll(tokens_BT, -1, axis=1)

  chunk = min(T, max(1, CHUNK_TOKENS // B))
  pad = -T % chunk
  as_chunks = lambda a: jnp.moveaxis(
    jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)).reshape(B, -1, chunk, *a.shape[2:]), 1, 0
  )

  @jax.checkpoint
  def add_chunk(total, xs):
    x_BcD, target_Bc, counted_Bc = xs
    logit_BcV = jnp.einsum('BcD,VD->BcV', x_BcD, head_VD, preferred_element_type=jnp.float32)
    nll_Bc = jax.nn.logsumexp(logit_BcV, -1) - jnp.take_along_axis(logit_BcV, target_Bc[..., None], -1)[..., 0]
    return total + jnp.sum(nll_Bc * counted_Bc), None

  total, _ = jax.lax.scan(add_chunk, jnp.float32(0), (as_chunks(x_BTD), as_chunks(target_BT), as_chunks(counted_BT)))
  return total, jnp.sum(counted_BT)


def loss(model, tokens_BT, terms, mode):
  """LM loss + Σ_l gate_weight_l·|g_l| + Σ_l delta_weight_l·R(d_l), and its parts (ELDeR, arXiv 2505.18232, section 3).

  Args:
    terms: {'alive_L': bool, 'gate_weight_L': fp32, 'delta_weight_L': fp32}. Stage 1 puts λ1 on the gates of the layers
      that are alive, stage 2 λ2 on the updates of the layers that will be removed; the rest is 0.
  """
  x_BTD, delta_L = model_lib.forward(model, tokens_BT, terms['alive_L'], mode)
  nll, count = next_token_nll(model, x_BTD, tokens_BT)
  lm = nll / count
  gate_l1 = jnp.sum(terms['gate_weight_L'] * jnp.abs(model.gate_L[...]))
  penalty = jnp.sum(terms['delta_weight_L'] * delta_L)
  return lm + gate_l1 + penalty, {'lm_loss': lm, 'gate_l1': gate_l1, 'penalty': penalty, 'delta_L': delta_L}
