"""Optimisers and the schedule of the learning rate."""

import jax
import jax.numpy as jnp
import optax

from elder_jax.model.matrices import is_matrix


def learning_rate(lr: float, steps: int, warmup_ratio: float):
  """Linear rise from 0 over warmup_ratio of the steps, linear fall to 0 at the last; the first step is never wasted."""
  warmup = round(warmup_ratio * steps)

  def rate(step):
    up = (step + 1) / max(1, warmup)
    down = (steps - step) / max(1, steps - warmup)
    return lr * jnp.minimum(1.0, jnp.minimum(up, down))

  return rate


def make_optimizer(
  train_mask, rate, weight_decay: float, clip: float, kind: str = 'adamw', moment_dtype: str = 'float32'
):
  """An optimiser with clipping for the leaves of the mask, nothing for the others; norms and biases do not decay.

  The same `rate` means a step of about the same size to adamw and adafactor: the latter is Shazeer and Stern's
  (arXiv 1804.04235) without its own rate schedule, scaling by the size of the weights and momentum.

  Args:
    kind: adamw, adafactor or lion.
    moment_dtype: of the first moments, which adafactor has not; second moments are float32.
  """

  def decays(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), tree)

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
  return optax.masked(optax.chain(optax.clip_by_global_norm(clip), tx), train_mask)
