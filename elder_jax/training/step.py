"""A training step: a masked optax optimiser over a partition of the model's tree.

Only trained leaves have gradients, float32 master weights and optimiser state. A mask splits the tree into two parts;
each has `None` in place of the other's leaves. optax.masked applies the same mask to the optimiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training import losses


class TrainState(NamedTuple):
  step: jax.Array  # int32, steps done
  trained: Decoder  # the trained leaves in float32, None elsewhere
  opt_state: Any
  history_RL: jax.Array | None = None  # of stage 1: all gates at the end of each completed round


def train_mask(model: Decoder, what: str) -> Decoder:
  """A tree like `model`, True at the leaves that train.

  Args:
    model: the model.
    what: gates; blocks (the weights of the layers); all (everything except the gates); lora (its factors); or the name
      of a parameter of the layers.
  """

  def trains(path, _):
    top, name = path[0].name, path[-2].name
    of = {'gates': top == 'gate_L', 'blocks': top == 'layers', 'all': top != 'gate_L'}
    return of.get(what, top == 'layers' and name in (('a', 'b') if what == 'lora' else (what,)))

  return jax.tree_util.tree_map_with_path(trains, model)


def partition(model, train_mask):
  """Splits a model into (trained, frozen), each with None at the other's leaves."""
  trained = jax.tree.map(lambda keep, leaf: leaf if keep else None, train_mask, model)
  frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, train_mask, model)
  return trained, frozen


def combine(trained, frozen):
  return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def init_state(model: Decoder, train_mask, tx, free: Callable | None = None) -> tuple[TrainState, Decoder]:
  """Returns (state, frozen). The state's arrays are copies in float32, so they can be donated while the model stays.

  Args:
    model: the model.
    train_mask: of `train_mask`.
    tx: an optax optimiser.
    free: called with each trained array of `model` once it is copied, if the model is not needed any more.
  """

  def copy(a):
    new = jnp.array(a, jnp.float32, copy=True)
    if free:
      jax.block_until_ready(new)
      free(a)
    return new

  trained, frozen = partition(model, train_mask)
  trained = jax.tree.map(copy, trained)
  state = TrainState(jnp.int32(0), trained, tx.init(trained))
  if mesh := _mesh(trained):
    # The sharding that a step returns, also for counters. Else the second step recompiles and a restored state fails.
    state = jax.device_put(state, sharding.for_state(state, mesh))
  return state, frozen


def _mesh(trained):
  """The mesh of the trained leaves; None if they are abstract or on a single device."""
  home = getattr(jax.tree.leaves(trained)[0], 'sharding', None)
  return home.mesh if isinstance(home, NamedSharding) else None


def on_all_devices(array, trained) -> jax.Array:
  """The array, replicated over the mesh of the trained leaves."""
  mesh = _mesh(trained)
  return jax.device_put(array, NamedSharding(mesh, PartitionSpec())) if mesh else jnp.asarray(array)


def _rows(batch_BT, terms: dict, grad_accum: int):
  """Splits the inputs of a step into ((tokens, the terms with one row per sequence), the other terms).

  With token weights, it adds the divisor of each micro-batch's sums: an equal share of the whole batch's count, not the
  micro-batch's own count, which varies.
  """
  if 'weight_BT' not in terms:
    return (batch_BT, {}), terms
  weight_BT = sharding.constrain_batch(jnp.asarray(terms['weight_BT'], jnp.float32))
  count = jnp.sum(losses.counted(batch_BT, weight_BT)) / grad_accum
  others = {name: term for name, term in terms.items() if name != 'weight_BT'}
  return (batch_BT, {'weight_BT': weight_BT}), others | {'count': count}


def make_step(tx, mode: Mode, grad_accum: int, rate, temperature: float = 1.0, gates: Callable | None = None):
  """A jitted step(state, (frozen, teacher), batch_BT, terms) -> (state, metrics).

  terms, temperature and teacher are as in losses.loss. Other values of the terms do not recompile. The state is donated.

  Args:
    tx: an optax optimiser.
    mode: of the computation.
    grad_accum: number of micro-batches per batch; means over tokens do not depend on it.
    rate: step -> learning rate, for the metrics.
    temperature: of the KL divergence.
    gates: (the model's gate_L, terms) -> the gates of the forward pass; None: the model's own.
  """

  def micro_loss(trained, fixed, rows, terms):
    frozen, teacher = fixed
    tokens_bT, of_rows = rows
    model, terms = combine(trained, frozen), terms | of_rows
    if gates is not None:
      terms['gate_L'] = gates(model.gate_L[...], terms)
    return losses.loss(model, tokens_bT, terms, mode, teacher, temperature)

  def split(a_BT):
    # Micro-batch i takes every grad_accum-th row, so that each lies on all devices of the batch.
    B, T = a_BT.shape
    return sharding.constrain_batch(a_BT.reshape(B // grad_accum, grad_accum, T).swapaxes(0, 1), 1)

  def step(state: TrainState, fixed, batch_BT, terms):
    rows, terms = _rows(batch_BT, terms, grad_accum)

    def of_part(rows):
      (loss, parts), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.trained, fixed, rows, terms)
      return sharding.replicate({'loss': loss, **parts}), sharding.constrain_state(grads)

    if grad_accum == 1:  # without a second buffer for the sum
      metrics, grads = of_part(rows)
    else:
      parts = jax.tree.map(split, rows)
      first = jax.tree.map(lambda a_AbT: a_AbT[0], parts)
      zeros, grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_part, first))

      def add(total, rows):
        return (jax.tree.map(lambda t, x: t + x / grad_accum, total, of_part(rows)), None)

      (metrics, grads), _ = jax.lax.scan(add, (zeros, sharding.constrain_state(grads)), parts)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    metrics |= sharding.replicate({'grad_norm': optax.global_norm(grads), 'lr': rate(state.step)})
    trained = optax.apply_updates(state.trained, updates)
    state = state._replace(step=state.step + 1, trained=trained, opt_state=opt_state)
    return sharding.constrain_state(state), metrics

  return jax.jit(step, donate_argnums=0)
