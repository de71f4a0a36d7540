"""`absorb` for layers with a norm after the MLP, like Gemma's: alternates the down projection and the norm's scale."""

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Shapes
from elder_jax.recipes.streams import Streams
from elder_jax.recipes.streams import get_layer
from elder_jax.recipes.streams import layer_at
from elder_jax.recipes.streams import put_layer
from elder_jax.recipes.sums import product
from elder_jax.recipes.sums import ridge
from elder_jax.recipes.sums import rows
from elder_jax.recipes.sums import solve_once
from elder_jax.recipes.sums import spread
from elder_jax.recipes.sums import weights

# Ridge strength for the layer before a removed block; see absorb.RIDGE.
RIDGE = 0.1
# The projection is refitted in rounds, each on this fraction of the text. The first round need not be exact.
ROUNDS = (0.25, 1.0)
SUMS = ROUNDS[0] + sum(ROUNDS) + 1  # passes over the text in one refit


def refit(current: Decoder, x: Streams, t: Streams, l: int, strength: float) -> tuple[float, float]:
  """Refits the MLP's update s ⊙ n(f·W) in layer l, with input x, towards the target t.

  f is the input of the down projection W, s the scale of the norm n(u) = u / ρ, and ρ the root mean square of u. The
  target of the update is r = target − m, where m is the residual stream after attention. The update is linear in W if ρ
  is fixed for each token, and linear in s if W is fixed. So:
    1. s = κ, the weighted root mean square of each channel of r. W becomes W ∘ (s_before / κ), which keeps the directions
       and makes the channels equally large for n.
    2. In each round ΔW is the ridge solution, as in `absorb`, of (f / ρ)·ΔW = r / κ − n(f·W).
    3. s_d = Σ w r_d n_d / Σ w n_d², for each channel d separately.
  The norm fixes the length of n for every token, so only its direction and the scale of each channel can be fitted. Step
  1 reads the same fraction of the text as the first round, step 3 all of it.

  Args:
    strength: Ridge strength.

  Returns:
    The relative squared error before, on the text of step 1, and after.
  """
  w_down, scale = current.layers.w_down, current.layers.post_mlp_norm.scale
  offset = current.layers.post_mlp_norm.offset
  r2_D, ry_D, y2_D, size, weight = x.totals(_channel_sums, current, l, beside=t, part=ROUNDS[0])
  before = np.sum(r2_D - 2 * ry_D + y2_D) / size
  kappa_D = np.sqrt(np.maximum(r2_D / weight, 1e-30))
  put_layer(w_down, get_layer(w_down, l) * ((get_layer(scale, l) + offset) / kappa_D), l)
  put_layer(scale, np.ones_like(kappa_D) - offset, l)  # so that the update is n
  for part in ROUNDS:
    gram, cross = x.totals(sums, current, l, kappa_D.astype(np.float32), beside=t, part=part)
    put_layer(w_down, get_layer(w_down, l) + solve_once(ridge, gram, cross, strength), l)
  r2_D, rn_D, n2_D, size, _ = x.totals(_channel_sums, current, l, beside=t)
  s_D = rn_D / np.maximum(n2_D, 1e-30)  # 0 for a channel that no layer writes to
  put_layer(scale, s_D - offset, l)
  return before, np.sum(r2_D - 2 * s_D * rn_D + s_D**2 * n2_D) / size


def no_scale(shapes: Shapes) -> np.ndarray:
  """A kappa_D for `sums`, for the plan."""
  return np.ones(shapes.spec.d_model, np.float32)


@jax.jit
def sums(x_BTD, target_BTD, model: Decoder, l, kappa_D):
  """Returns (Σ w a·aᵀ, Σ w a·(r/κ − n)ᵀ) with a = f/ρ. The scale of the norm must be 1. See `refit`."""
  block, f_BTF, mid_BTD = _parts(model, l, x_BTD)
  n_SD, u_SD = rows(block.mlp_update(f_BTF, mid_BTD)), rows(block.mlp_output(f_BTF))
  a_SF = rows(f_BTF) * jax.lax.rsqrt(jnp.mean(u_SD * u_SD, -1, keepdims=True) + block.post_mlp_norm.eps)
  wanted_SD = (rows(target_BTD) - rows(mid_BTD)) / kappa_D[None]
  weighted_SF = a_SF * weights(rows(target_BTD))
  return spread((product(weighted_SF, a_SF), product(weighted_SF, wanted_SD - n_SD)))


@jax.jit
def _channel_sums(x_BTD, target_BTD, model: Decoder, l):
  """Returns Σ w r², Σ w r y, Σ w y² per channel, then Σ w ‖target‖² and Σ w. y: the MLP's update, r: its target."""
  block, f_BTF, mid_BTD = _parts(model, l, x_BTD)
  y_SD, r_SD = rows(block.mlp_update(f_BTF, mid_BTD)), rows(target_BTD) - rows(mid_BTD)
  t_SD = rows(target_BTD)
  w_S1 = weights(t_SD)

  def of_D(a_SD, b_SD):
    return jnp.sum(w_S1 * a_SD * b_SD, 0)

  return spread((of_D(r_SD, r_SD), of_D(r_SD, y_SD), of_D(y_SD, y_SD), jnp.sum(w_S1 * t_SD**2), jnp.sum(w_S1)))


def _parts(model: Decoder, l, x_BTD):
  """Returns (layer l, the input of its down projection, the residual stream after its attention)."""
  block, attended_BTNH = layer_at(model, l, x_BTD)
  attn_BTD = block.attn_update(attended_BTNH, x_BTD)
  return block, block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD
