"""The one loop of both stages: a masked optax optimiser over a partition of the model's tree.

Only what trains has gradients, float32 master weights and optimiser state: the tree is cut in two by a mask, `None`
standing where the other part has its leaves, and the optimiser is optax.masked by the same mask.
"""

from collections.abc import Callable
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from elder_jax.devices import preemption
from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.training import losses


class TrainState(NamedTuple):
  step: jax.Array  # int32, steps done
  trained: Decoder  # the trained leaves in float32, None elsewhere
  opt_state: Any
  history_RL: jax.Array | None = None  # of stage 1: all gates at the end of each round that is over


class NonFiniteLoss(RuntimeError):
  """The loss or its gradient became NaN or infinite."""


def mask(model: Decoder, what: str) -> Decoder:
  """True at the leaves that train. what: gates; blocks, the layers' weights; all, all but the gates; lora, its factors."""

  def trains(path, _):
    top, name = path[0].name, path[-2].name
    return {
      'gates': top == 'gate_L',
      'blocks': top == 'layers',
      'all': top != 'gate_L',
      'lora': top == 'layers' and name in ('a', 'b'),
    }[what]

  return jax.tree_util.tree_map_with_path(trains, model)


def partition(model, mask):
  """(trained, frozen): each with None at the other's leaves."""
  trained = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, model)
  frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, model)
  return trained, frozen


def combine(trained, frozen):
  return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def schedule(lr: float, steps: int, warmup_ratio: float):
  """Linear rise from 0 over warmup_ratio of the steps, linear fall to 0 at the last; the first step is never wasted."""
  warmup = round(warmup_ratio * steps)

  def rate(step):
    up = (step + 1) / max(1, warmup)
    down = (steps - step) / max(1, steps - warmup)
    return lr * jnp.minimum(1.0, jnp.minimum(up, down))

  return rate


def optimizer(mask, rate, weight_decay: float, clip: float, kind: str = 'adamw', moment_dtype: str = 'float32'):
  """An optimiser with clipping for the leaves of the mask, nothing for the others; norms and biases do not decay.

  The same `rate` means a step of about the same size to adamw and adafactor: the latter is Shazeer and Stern's
  (arXiv 1804.04235) without its own rate schedule, scaling by the size of the weights and momentum.

  Args:
    kind: adamw, adafactor or lion.
    moment_dtype: of the first moments, which adafactor has not; second moments are float32.
  """
  # By name: stacked, they have two axes, too.
  is_matrix = lambda path, _: not re.search(r'norm|bias|\.b[a-z_]+\.value', jax.tree_util.keystr(path))
  decays = lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree)
  if kind == 'adafactor':
    tx = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(weight_decay, mask=decays),
      optax.scale_by_learning_rate(rate),
    )
  else:
    make = {'adamw': optax.adamw, 'lion': optax.lion}[kind]
    tx = make(rate, weight_decay=weight_decay, mask=decays, mu_dtype=moment_dtype)
  return optax.masked(optax.chain(optax.clip_by_global_norm(clip), tx), mask)


def init(model: Decoder, mask, tx, free: Callable | None = None) -> tuple[TrainState, Decoder]:
  """(state, frozen). The state's arrays are new, so that they can be donated while the model lives on.

  Args:
    free: called with each array of `model` that trains when it has been copied, for a model that need not live on.
  """

  def copy(a):
    new = jnp.array(a, jnp.float32, copy=True)
    if free:
      jax.block_until_ready(new)
      free(a)
    return new

  trained, frozen = partition(model, mask)
  trained = jax.tree.map(copy, trained)
  state = TrainState(jnp.int32(0), trained, tx.init(trained))
  if mesh := _mesh(trained):
    # As a step leaves it, counters too: else the second step compiles anew, and a restored state does not run at all.
    state = jax.device_put(state, sharding.for_state(state, mesh))
  return state, frozen


def _mesh(trained):
  """What the trained leaves lie on; None of a single device's or of abstract ones, which lie nowhere."""
  home = getattr(jax.tree.leaves(trained)[0], 'sharding', None)
  return home.mesh if isinstance(home, NamedSharding) else None


def on_all_devices(array, trained) -> jax.Array:
  """The array, replicated over the mesh that the trained leaves lie on."""
  mesh = _mesh(trained)
  return jax.device_put(array, NamedSharding(mesh, PartitionSpec())) if mesh else jnp.asarray(array)


def make_step(tx, mode: Mode, grad_accum: int, rate, distill: float = 0.0):
  """A jitted step(state, (frozen, teacher), batch_BT, terms) -> (state, metrics).

  terms, distill and teacher (None without distillation) as in losses.loss; no recompilation for other terms.
  """

  def micro_loss(trained, fixed, tokens_bT, terms):
    frozen, teacher = fixed
    return losses.loss(combine(trained, frozen), tokens_bT, terms, mode, teacher, distill)

  def step(state: TrainState, fixed, batch_BT, terms):
    B, T = batch_BT.shape

    def of_part(tokens_bT):
      (loss, parts), grads = jax.value_and_grad(micro_loss, has_aux=True)(state.trained, fixed, tokens_bT, terms)
      return sharding.replicate({'loss': loss, **parts}), sharding.constrain_state(grads)

    if grad_accum == 1:  # no second buffer for the sum
      metrics, grads = of_part(batch_BT)
    else:
      # Part i takes every grad_accum-th row, so that each part lies on all devices that the batch lies on.
      parts_AbT = sharding.constrain_batch(batch_BT.reshape(B // grad_accum, grad_accum, T).swapaxes(0, 1), 1)
      zeros, grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(of_part, parts_AbT[0]))
      add = lambda total, tokens_bT: (jax.tree.map(lambda t, x: t + x / grad_accum, total, of_part(tokens_bT)), None)
      (metrics, grads), _ = jax.lax.scan(add, (zeros, sharding.constrain_state(grads)), parts_AbT)
    updates, opt_state = tx.update(grads, state.opt_state, state.trained)
    metrics |= sharding.replicate({'grad_norm': optax.global_norm(grads), 'lr': rate(state.step)})
    trained = optax.apply_updates(state.trained, updates)
    state = state._replace(step=state.step + 1, trained=trained, opt_state=opt_state)
    return sharding.constrain_state(state), metrics

  return jax.jit(step, donate_argnums=0)


def fit(
  step_fn,
  state: TrainState,
  fixed,
  steps: int,
  batch: Callable[[int], jax.Array],
  terms: Callable[[int], dict],
  log: Callable[[int, dict], None],
  checkpoint=None,
) -> TrainState:
  """Runs step_fn until `steps` are done; batch and terms are pure functions of the step, so that resume is the step.

  Metrics are read one step late, so that the device does not wait for the host, but before a checkpoint is written.
  Whatever ends the loop, a checkpoint that is being written is finished.

  Args:
    log: called with (step, metrics).
    checkpoint: a checkpoint.Checkpoints to write to, or None.

  Raises:
    NonFiniteLoss: at the first step whose loss or gradient is not finite; nothing of it is saved.
    Preempted: after SIGTERM or a notice of preemption, when the step that ran is over and saved.
  """
  waiting, stop = None, False
  try:
    for i in range(int(state.step), steps):
      state, metrics = step_fn(state, fixed, batch(i), terms(i))
      if waiting:
        _log(log, *waiting)
      waiting = i, metrics
      stop = preemption.reached()
      if checkpoint and (stop or checkpoint.due(i + 1)):
        _log(log, *waiting)
        waiting = None
        checkpoint.save(state)
      if stop:
        break
    if waiting:
      _log(log, *waiting)
  finally:
    if checkpoint:
      checkpoint.wait()
  if stop:
    saved = f'of {checkpoint.stage}; saved' if checkpoint else 'of a training that is not saved'
    raise preemption.Preempted(
      f'stopped by {preemption.by()} after step {i + 1} {saved}; rerun the same command to resume'
    )
  return state


def _log(log, i, metrics):
  metrics = {k: np.asarray(v) for k, v in jax.device_get(metrics).items()}
  for name, value in (('loss', metrics['loss']), ('gradient', metrics['grad_norm'])):
    if not math.isfinite(value):
      raise NonFiniteLoss(f'the {name} of step {i + 1} is {float(value)}; lower --lr, --gate_lr or --lambda2')
  log(i, metrics)
