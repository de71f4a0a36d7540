"""The one loss of both stages: language modelling + gate L1 + penalty on the updates of layers that will go.

Dimension names: see model.py.
"""

import jax
import jax.numpy as jnp

from elder_jax import model as model_lib
from elder_jax import sharding

CHUNK_TOKENS = 1024  # of the part of a batch that a device has, whose float32 logits are alive at a time


def next_token_nll(model, x_BTD, tokens_BT, weight_BT=None):
  """Sum over tokens of −log p(next token), float32, and the number of tokens summed (their weights' sum).

  Args:
    x_BTD: forward's hidden states.
    tokens_BT: the tokens that were read; position t is asked for tokens[t + 1], the last for nothing.
    weight_BT: 0 for a position whose next token is not to be counted; None counts all.
  """
  nll, _, count = _token_sums(model, x_BTD, tokens_BT, weight_BT)
  return nll, count


def chunk_length(B: int, T: int) -> int:
  """Tokens of each row of a batch whose logits are computed together."""
  return min(T, max(1, CHUNK_TOKENS * sharding.batch_ways() // B))


def _token_sums(model, x_BTD, tokens_BT, weight_BT=None, teacher=None):
  """next_token_nll and between its two results the sum over tokens of KL(teacher ‖ model); 0 without a teacher.

  Goes through the sequence in chunks and computes each chunk's logits again in the backward pass: [B, T, V] is never
  in memory. Chunks are cut along T, so that a batch that is sharded over devices stays so.

  Args:
    teacher: (a Decoder, its hidden states as x_BTD), or None.
  """
  B, T = tokens_BT.shape
  counted_BT = jnp.broadcast_to(jnp.arange(T)[None] < T - 1, (B, T)).astype(jnp.float32)
  if weight_BT is not None:
    counted_BT = counted_BT * weight_BT
  target_BT = jnp.roll(tokens_BT, -1, axis=1)

  chunk = chunk_length(B, T)
  pad = -T % chunk
  as_chunks = lambda a: jnp.moveaxis(
    jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)).reshape(B, -1, chunk, *a.shape[2:]), 1, 0
  )

  head_VD = model_lib.head(model)
  teacher_head_VD = model_lib.head(teacher[0]) if teacher else None

  @jax.checkpoint
  def add_chunk(totals, xs):
    x_BcD, target_Bc, counted_Bc, y_BcD = xs
    logit_BcV = model_lib.logits(model, x_BcD, head_VD)
    log_z_Bc = jax.nn.logsumexp(logit_BcV, -1)
    nll_Bc = log_z_Bc - jnp.take_along_axis(logit_BcV, target_Bc[..., None], -1)[..., 0]
    kl_Bc = jnp.zeros_like(nll_Bc)
    if teacher:
      # Σ_v p log(p / q), with log p = t − log Z_t and log q = s − log Z_s.
      teacher_BcV = model_lib.logits(teacher[0], y_BcD, teacher_head_VD)
      p_BcV = jax.nn.softmax(teacher_BcV, -1)
      kl_Bc = jnp.sum(p_BcV * (teacher_BcV - logit_BcV), -1) - jax.nn.logsumexp(teacher_BcV, -1) + log_z_Bc
    nll, kl = totals
    return (nll + jnp.sum(nll_Bc * counted_Bc), kl + jnp.sum(kl_Bc * counted_Bc)), None

  y_BTD = teacher[1] if teacher else None
  xs = jax.tree.map(as_chunks, (x_BTD, target_BT, counted_BT, y_BTD))
  (nll, kl), _ = jax.lax.scan(add_chunk, (jnp.float32(0), jnp.float32(0)), xs)
  return nll, kl, jnp.sum(counted_BT)


def loss(model, tokens_BT, terms, mode, teacher=None, distill=0.0):
  """(1 − w)·LM loss + w·KL + Σ_l gate_weight_l·|g_l| + Σ_l delta_weight_l·R(d_l), and its parts.

  ELDeR (arXiv 2505.18232, section 3) for w = `distill` = 0. KL is the mean over predicted tokens of
  KL(teacher ‖ model) between the next-token distributions at temperature 1 (Hinton et al., arXiv 1503.02531).

  Args:
    terms: {'alive_L': bool, 'gate_weight_L': fp32, 'delta_weight_L': fp32}, and where it is given 'gate_L' (fp32) in
      place of the model's own gates. Stage 1 puts λ1 on the gates of the layers that are alive, stage 2 λ2 on the
      updates of the layers that will be removed; the rest is 0.
    teacher: the Decoder to be distilled, run with its gates at 1; needed where distill > 0. No gradient goes into it.
  """
  x_BTD, delta_L = model_lib.forward(model, tokens_BT, terms['alive_L'], mode, terms.get('gate_L'))
  seen = None
  if distill:
    ones_L = jnp.ones(teacher.num_layers, jnp.float32)
    seen = jax.lax.stop_gradient((teacher, model_lib.forward(teacher, tokens_BT, mode=mode, gate_L=ones_L)[0]))
  nll, kl, count = _token_sums(model, x_BTD, tokens_BT, teacher=seen)
  lm, kl = nll / count, kl / count
  gate_l1 = jnp.sum(terms['gate_weight_L'] * jnp.abs(model.gate_L[...]))
  penalty = jnp.sum(terms['delta_weight_L'] * delta_L)
  parts = {'lm_loss': lm, 'gate_l1': gate_l1, 'penalty': penalty, 'delta_L': delta_L} | ({'kl': kl} if distill else {})
  return (1 - distill) * lm + distill * kl + gate_l1 + penalty, parts
