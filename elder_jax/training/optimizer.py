"""Optimisers and the schedule of the learning rate."""

import jax
import jax.numpy as jnp
import optax

from elder_jax.model.matrices import is_matrix


def learning_rate(
  lr: float, steps: int, warmup_ratio: float, schedule: str = 'linear', final: float = 0.0, decay_ratio: float = 0.2
):
  """Linear rise from 0 over warmup_ratio of the steps, then the schedule; the first step is never wasted.

  With final = 0 the last step is not wasted either: what falls reaches `final` one step after it.

  Args:
    schedule: linear: falls from the peak to the end. cosine: the same along half a cosine (Loshchilov and Hutter, arXiv
      1608.03983). wsd, warmup-stable-decay: at the peak, then linear over the last decay_ratio of the steps (Hu et al.,
      arXiv 2404.06395); the fall does not begin before the rise is over.
    final: fraction of the peak at the end.
  """
  warmup = round(warmup_ratio * steps)
  falling = steps - warmup
  if schedule == 'wsd':
    falling = min(falling, round(decay_ratio * steps))

  def rate(step):
    up = (step + 1) / max(1, warmup)
    left = (steps - step) / max(1, falling)  # of the fall; above 1 before it
    if schedule == 'cosine':
      left = (
        jnp.sin(jnp.pi / 2 * jnp.minimum(1.0, left)) ** 2
      )  # (1 − cos πf) / 2, which float32 rounds to 0 near the end
    return lr * jnp.minimum(1.0, jnp.minimum(up, final + (1 - final) * left))

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
