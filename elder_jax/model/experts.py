"""Mixture of experts: a router selects a few of many MLPs for each token.

Dimensions besides those of decoder.py: E expert, k selected expert of a token, S pair of a token and a selected expert,
sorted by expert.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from elder_jax.devices import sharding
from elder_jax.model.spec import Spec


def chosen(spec: Spec, score_BTE):
  """Returns each token's experts (int32) and their weights (float32), both [B, T, k], from the router's fp32 scores."""
  best_BTk, expert_BTk = jax.lax.top_k(score_BTE, spec.experts_per_token)
  if spec.router == 'chosen':
    return expert_BTk, jax.nn.softmax(best_BTk, -1)
  return expert_BTk, jnp.exp(best_BTk - jax.nn.logsumexp(score_BTE, -1, keepdims=True))


def mixture(spec: Spec, h_BTD, expert_BTk, share_BTk, weights: dict, act: Callable):
  """Returns Σ over a token's experts of share · MLP_expert(h), [B, T, D].

  Each device of the tp axis holds E / tp experts. It sorts the tokens by expert, multiplies each group with the matrices
  of its expert (jax.lax.ragged_dot), and the results are summed over the tp axis.

  Args:
    weights: w_gate, w_up [E, D, F], w_down [E, F, D], b_gate, b_up [E, F] and b_down [E, D] by name; each may be None.
    act: (gate [S, F] or None, up [S, F]) -> [S, F].
  """
  run = functools.partial(_of_own_experts, act, spec.experts_per_token)
  ways = sharding.mesh_sizes()
  if not ways:
    return run(h_BTD, expert_BTk, share_BTk, weights, jnp.zeros(1, jnp.int32))
  batch = sharding.batch_axes(h_BTD.shape[0])
  own = P('tp')
  first = jnp.arange(ways['tp'], dtype=jnp.int32) * (spec.experts // ways['tp'])

  def on_a_device(*args):
    return jax.lax.psum(run(*args), 'tp')

  places = P(batch), P(batch), P(batch), jax.tree.map(lambda _: own, weights), own
  # With check_vma the gradients of h and share miss the parts of other devices (jax 0.10.2; tests/model/experts_test.py).
  run_on_all = jax.shard_map(on_a_device, in_specs=places, out_specs=P(batch), check_vma=False)
  return run_on_all(h_BTD, expert_BTk, share_BTk, weights, first)


def _of_own_experts(act: Callable, k: int, h_BTD, expert_BTk, share_BTk, weights: dict, first_1):
  """The part of `mixture` by the experts first … first + E − 1. weights: those of these E experts."""
  B, T, D = h_BTD.shape
  E = weights['w_up'].shape[0]
  expert_S = expert_BTk.reshape(-1) - first_1[0]
  group_S = jnp.where((expert_S >= 0) & (expert_S < E), expert_S, E)  # E: an expert of another device
  order_S = jnp.argsort(group_S, stable=True)
  back_S = jnp.argsort(order_S)
  sorted_S = jnp.take(group_S, order_S, unique_indices=True)
  sizes_E = jnp.sum(group_S[None] == jnp.arange(E)[:, None], 1, dtype=jnp.int32)

  def move(rows, to_S):
    return jnp.take(rows, to_S, axis=0, unique_indices=True)

  def project(x_SI, w, b):
    if weights[w] is None:
      return None
    y_SO = jax.lax.ragged_dot(x_SI, weights[w], sizes_E)
    if weights[b] is None:
      return y_SO
    return y_SO + jnp.take(weights[b], jnp.minimum(sorted_S, E - 1), axis=0)

  x_SD = move(jnp.repeat(h_BTD.reshape(B * T, D), k, axis=0), order_S)
  f_SF = act(project(x_SD, 'w_gate', 'b_gate'), project(x_SD, 'w_up', 'b_up'))
  y_SD = project(f_SF, 'w_down', 'b_down')
  share_S1 = move(share_BTk.reshape(-1), order_S)[:, None].astype(y_SD.dtype)
  y_SD = jnp.where((sorted_S < E)[:, None], y_SD * share_S1, 0)
  return jnp.sum(move(y_SD, back_S).reshape(B, T, k, D), 2)
