"""Optimisers and learning-rate schedules."""

import jax
import jax.numpy as jnp
import optax

from elder_jax.model.matrices import is_matrix


def learning_rate(
  lr: float, steps: int, warmup_ratio: float, schedule: str = 'linear', final: float = 0.0, decay_ratio: float = 0.2
):
  """A linear warm-up from 0 over warmup_ratio of the steps, then a decay. Returns step -> learning rate.

  No step has rate 0: the warm-up is above 0 at the first step, and the decay reaches `final` one step after the last.

  Args:
    lr: the peak.
    steps: total number of steps.
    warmup_ratio: fraction of the steps that warm up.
    schedule: linear: decays linearly from the peak. cosine: decays along half a cosine (Loshchilov and Hutter, arXiv
      1608.03983). wsd, warmup-stable-decay: stays at the peak, then decays linearly over the last decay_ratio of the
      steps, at the earliest after the warm-up (Hu et al., arXiv 2404.06395).
    final: learning rate at the end, as a fraction of the peak.
    decay_ratio: fraction of the steps that decay, for wsd.
  """
  warmup = round(warmup_ratio * steps)
  falling = steps - warmup
  if schedule == 'wsd':
    falling = min(falling, round(decay_ratio * steps))

  def rate(step):
    up = (step + 1) / max(1, warmup)
    left = (steps - step) / max(1, falling)  # remaining fraction of the decay; above 1 before it starts
    if schedule == 'cosine':
      # sin² because float32 rounds (1 − cos πf) / 2 to 0 near the end.
      left = jnp.sin(jnp.pi / 2 * jnp.minimum(1.0, left)) ** 2
    return lr * jnp.minimum(1.0, jnp.minimum(up, final + (1 - final) * left))

  return rate


def make_optimizer(
  train_mask, rate, weight_decay: float, clip: float, kind: str = 'adamw', moment_dtype: str = 'float32'
):
  """An optimiser with gradient clipping for the leaves of the mask; other leaves stay as they are.

  adafactor is Shazeer and Stern's (arXiv 1804.04235), without its learning-rate schedule, parameter scaling and momentum,
  so that adamw and adafactor make steps of about the same size with the same `rate`.

  Args:
    train_mask: True at leaves that train.
    rate: step -> learning rate.
    weight_decay: of matrices; norms and biases do not decay.
    clip: largest global norm of the gradient.
    kind: adamw, adafactor or lion.
    moment_dtype: dtype of the first moments, which adafactor does not have; second moments are float32.
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
