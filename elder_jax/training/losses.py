"""The loss of both stages: language modelling + distillation + L1 of the gates + penalty on updates of chosen layers.

Dimension names: see model/decoder.py. C is the number of chunks, c the tokens per row of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import final_norm
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import head_of
from elder_jax.model.decoder import project
from elder_jax.model.decoder import run_layers
from elder_jax.training import hidden
from elder_jax.training.penalty import measure_of

# Tokens per device whose float32 logits are in memory at a time. On a CPU they should fit its cache: with 128 instead of
# 1024 a forward pass is faster (docs/decisions/devices.md).
CHUNK_TOKENS = {'cpu': 128, 'gpu': 1024, 'tpu': 1024}


def next_token_nll(model, x_BTD, tokens_BT, weight_BT=None):
  """Returns (Σ −log p(next token) over tokens, in nats; the token count, or the sum of the weights), float32 scalars.

  Args:
    model: its head is used.
    x_BTD: hidden states of `forward`.
    tokens_BT: the input tokens. Position t predicts tokens[t + 1]; the last position predicts nothing.
    weight_BT: 0 for a position whose next token does not count; None: all count.
  """
  nll, _, _, count = _token_sums(model, x_BTD, tokens_BT, weight_BT)
  return nll, count


@functools.partial(jax.jit, static_argnames='mode')
def batch_nll(model, tokens_BT, weight_BT, mode, alive_L=None):
  """`next_token_nll` of a batch, replicated on all devices. alive_L: see decoder.forward."""
  x_BTD, _ = forward(model, tokens_BT, alive_L, mode)
  return sharding.replicate(next_token_nll(model, x_BTD, tokens_BT, weight_BT))


def chunk_length(B: int, T: int) -> int:
  """Tokens of each row of a batch whose logits are computed together."""
  return min(T, max(1, CHUNK_TOKENS.get(sharding.platform(), 1024) * sharding.batch_ways() // B))


def counted(tokens_BT, weight_BT=None):
  """float32 [B, T]: the weight of each position's next token; 0 at the last position, which has none."""
  B, T = tokens_BT.shape
  counted_BT = jnp.broadcast_to(jnp.arange(T)[None] < T - 1, (B, T)).astype(jnp.float32)
  return counted_BT if weight_BT is None else counted_BT * weight_BT


def _token_sums(model, x_BTD, tokens_BT, weight_BT=None, teacher=None, distill=0.0, temperature=1.0):
  """Returns (objective, nll, kl, token count), each summed over tokens. Only `objective` carries a gradient.

  objective = (1 − w)·nll + w·KL(teacher ‖ model) with w = `distill`. The sequence is processed in chunks, so logits
  [B, T, V] are never in memory. Chunks are cut along T, so a batch that is sharded over devices stays sharded.

  Args:
    teacher: (a Decoder, its hidden states as x_BTD); None: objective = nll.
    distill: a number or an fp32 scalar.
    temperature: of both distributions in the KL, which is multiplied by its square.
  """
  B, T = tokens_BT.shape
  counted_BT = counted(tokens_BT, weight_BT)
  target_BT = jnp.roll(tokens_BT, -1, axis=1)

  chunk = chunk_length(B, T)
  pad = -T % chunk

  def as_chunks(a):
    return jnp.moveaxis(
      jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)).reshape(B, -1, chunk, *a.shape[2:]), 1, 0
    )

  outputs = model.spec.outputs(), teacher[0].spec.outputs() if teacher else None
  sums = functools.partial(_chunk_sums, outputs=outputs, temperature=temperature)
  taught = jax.lax.stop_gradient((head_of(teacher[0]), jnp.asarray(distill, jnp.float32))) if teacher else None
  x_CBcD, *rest = jax.tree.map(as_chunks, (x_BTD, target_BT, counted_BT, teacher[1] if teacher else None))
  total, (nll, kl) = _sum_chunks(sums, head_of(model), x_CBcD, taught, rest)
  return total, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(kl), jnp.sum(counted_BT)


def _chunk_sums(head_of, x_BcD, taught, rest, outputs, temperature: float):
  """(objective, (nll, KL)) of one chunk. taught: (the teacher's head, the weight of the KL), or None."""
  target_Bc, counted_Bc, y_BcD = rest
  logit_BcV = project(head_of, x_BcD, outputs[0])
  log_z_Bc = jax.nn.logsumexp(logit_BcV, -1)
  nll_Bc = log_z_Bc - jnp.take_along_axis(logit_BcV, target_Bc[..., None], -1)[..., 0]
  nll = jnp.sum(nll_Bc * counted_Bc)
  if taught is None:
    return nll, (nll, jnp.float32(0))
  teacher_head, distill = taught
  teacher_BcV = project(teacher_head, y_BcD, outputs[1])
  if temperature != 1:
    teacher_BcV, logit_BcV = teacher_BcV / temperature, logit_BcV / temperature
    log_z_Bc = jax.nn.logsumexp(logit_BcV, -1)
  # Σ_v p log(p / q), with log p = t − log Z_t and log q = s − log Z_s.
  p_BcV = jax.nn.softmax(teacher_BcV, -1)
  kl_Bc = jnp.sum(p_BcV * (teacher_BcV - logit_BcV), -1) - jax.nn.logsumexp(teacher_BcV, -1) + log_z_Bc
  kl = temperature**2 * jnp.sum(kl_Bc * counted_Bc)
  return (1 - distill) * nll + distill * kl, (nll, kl)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(sums, head_of, x_CBcD, taught, rest):
  """Σ sums(head, x, taught, rest) over the chunks. Only its first result has a gradient, to `head` and x.

  If the head is frozen, the forward pass also computes the gradient to x, while the logits of a chunk are in memory.
  The backward pass then recomputes no logits: 2 products with the head instead of 3, and half of those with the
  teacher's. Liger's FusedLinearCrossEntropy (arXiv 2410.10989) does the same, also for a trained head, at the cost of
  holding the head's gradient.
  """
  return _scan_chunks(sums, head_of, x_CBcD, taught, rest)


def _scan_chunks(sums, head_of, x_CBcD, taught, rest):
  def add(total, xs):
    return (jax.tree.map(jnp.add, total, sums(head_of, xs[0], taught, xs[1])), None)

  return jax.lax.scan(add, _NOTHING, (x_CBcD, rest))[0]


_NOTHING = np.float32(0), (np.float32(0), np.float32(0))


def _sum_chunks_forward(sums, head_of, x_CBcD, taught, rest):
  trained = any(a.perturbed for a in jax.tree.leaves(head_of))
  head_of, x_CBcD, taught, rest = jax.tree.map(lambda a: a.value, (head_of, x_CBcD, taught, rest))
  if trained:

    def again(*trained):
      return _scan_chunks(jax.checkpoint(sums), *trained, taught, rest)

    total, back, parts = jax.vjp(again, head_of, x_CBcD, has_aux=True)
    return (total, parts), (back, None)

  def add(total, xs):
    def of_x(x_BcD):
      return sums(head_of, x_BcD, taught, xs[1])

    one, to_x_BcD = jax.value_and_grad(of_x, has_aux=True)(xs[0])
    return jax.tree.map(jnp.add, total, one), to_x_BcD

  total, to_x_CBcD = jax.lax.scan(add, _NOTHING, (x_CBcD, rest))
  return total, (None, to_x_CBcD)


def _sum_chunks_backward(sums, kept, cotangents):
  back, to_x_CBcD = kept
  if back is not None:
    return *back(cotangents[0]), None, None
  return None, (to_x_CBcD * cotangents[0]).astype(to_x_CBcD.dtype), None, None


_sum_chunks.defvjp(_sum_chunks_forward, _sum_chunks_backward, symbolic_zeros=True)


def loss(model, tokens_BT, terms, mode, teacher=None, temperature=1.0):
  """The loss (1 − w)·LM + w·KL + h·hidden + Σ_l gate_weight_l·|g_l| + Σ_l delta_weight_l·R(d_l), and its parts.

  For w = h = 0 this is ELDeR (arXiv 2505.18232, section 3): stage 1 sets gate_weight to λ1 for the layers that are
  alive, stage 2 sets delta_weight to λ2 for the layers that will be removed; other weights are 0. LM is the mean over
  predicted tokens of −log p. KL is the mean over predicted tokens of KL(teacher ‖ model) between the next-token
  distributions at `temperature`, times its square (Hinton et al., arXiv 1503.02531). hidden is the mean over predicted
  tokens and layers of ‖s − t‖² / ‖t‖² between the residual streams of the model and the teacher (hidden.py).

  Args:
    model: the model.
    tokens_BT: int32.
    terms: {'alive_L': bool, 'gate_weight_L': fp32, 'delta_weight_L': fp32}, and optionally:
      'gate_L' (fp32): replaces the gates of the model.
      'distill' (fp32): the weight w.
      'hidden' (fp32), 'kept_L' (int32): the weight h, and the teacher's layer that each layer of the model was.
      'weight_BT' (fp32): 0 at a position whose next token does not count.
      'count' (fp32): divides the sums over tokens in place of the sum of the weights.
    mode: of the computation.
    teacher: the Decoder to distil from, run with its gates at 1 and without gradient. Required for 'distill' and
      'hidden', else ignored.
    temperature: of the KL.

  Returns:
    (objective, {'lm_loss', 'gate_l1', 'penalty', 'delta_L', and 'kl', 'hidden' if computed}).
  """
  weight_BT, kept_L = terms.get('weight_BT'), terms.get('kept_L')
  seen = compare = None
  if 'distill' in terms or 'hidden' in terms:
    y_BTD, y_LBTD = hidden.teacher_streams(teacher, tokens_BT, mode, kept_L)
    seen = jax.lax.stop_gradient((teacher, final_norm(teacher, y_BTD))) if 'distill' in terms else None
  if 'hidden' in terms:
    error = hidden.comparison(counted(tokens_BT, weight_BT))
    compare = error, y_LBTD
  x_BTD, delta_L, *error_L = run_layers(
    model,
    embed(model, tokens_BT, mode),
    terms['alive_L'],
    mode,
    terms.get('gate_L'),
    measure=measure_of(mode),
    compare=compare,
  )
  total, nll, kl, count = _token_sums(
    model, final_norm(model, x_BTD), tokens_BT, weight_BT, seen, terms.get('distill', 0.0), temperature
  )
  if weight_BT is not None:  # if no token counts, the sums are 0, and so is the loss
    count = terms.get('count', count)
    count = jnp.where(count > 0, count, 1.0)
  gate_l1 = jnp.sum(terms['gate_weight_L'] * jnp.abs(model.gate_L[...]))
  penalty = jnp.sum(terms['delta_weight_L'] * delta_L)
  parts = {'lm_loss': nll / count, 'gate_l1': gate_l1, 'penalty': penalty, 'delta_L': delta_L}
  objective = total / count + gate_l1 + penalty
  if 'distill' in terms:
    parts['kl'] = kl / count
  if compare:
    parts['hidden'] = hidden.mean_error(*error_L, error(x_BTD, y_BTD), terms['alive_L']) / count
    objective += terms['hidden'] * parts['hidden']
  return objective, parts
