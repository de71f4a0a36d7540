"""Removal in closed form: the layer before each removed run of layers is refitted to write what the run would write.

Only its MLP's down projection changes, so that the pruned model is of the stock architecture, with no new tensor.
Needs forward passes and one linear solve for each run of removed layers, no gradients.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax import hosts
from elder_jax import model as model_lib
from elder_jax import prune
from elder_jax import sharding
from elder_jax.errors import InputError
from elder_jax.model import Decoder
from elder_jax.model import Mode
from elder_jax.model import Spec

# Ridge of `absorb`, times the mean diagonal of its Gram matrix. Chosen on validation text: docs/decisions.md.
RIDGE = 0.1

Batches = Sequence[jax.Array]


def absorb(model: Decoder, removed: Sequence[int], batches: Batches, mode: Mode, log=None) -> Decoder:
  """The pruned model, in which the layers before the removed runs do these runs' work as far as they can.

  Of the layer before a run, f is what the down projection W_FD reads and r = target − (m + f·W) what the pruned stream
  lacks, with m the stream after the layer's attention and target the dense model's stream after the run. The change
  of W is the ridge solution
    ΔW = (Σ w f·fᵀ + λI)⁻¹ Σ w f·rᵀ,  w = 1 / ‖target‖²,  λ = RIDGE · the mean diagonal of Σ w f·fᵀ,
  the sums over all tokens: the error relative to the stream, as the next layer's norm reads it. Runs are worked off
  upwards, each on the stream that those below it really leave.

  A run that begins at layer 0 has no layer before it and is only removed.

  Args:
    batches: tokens [B, T] on the devices.
    log: called with (layer, the run's end, relative squared error before, after) for each run.
  """

  def solve(gram_FF, cross_FD):
    ridge = RIDGE * np.trace(gram_FF) / len(gram_FF)
    return np.linalg.solve(gram_FF + ridge * np.eye(len(gram_FF)), cross_FD)

  return _refit(model, removed, batches, mode, 'features', solve, lambda w_FD, delta_FD: w_FD + delta_FD, log)


def check(spec: Spec, recipe: str):
  """Raises InputError where the stream is not linear in the down projection, so that there is no closed form."""
  if spec.block in ('sandwich', 'post'):
    raise InputError(
      f'--recipe={recipe}: layers of this family norm what their MLP gives, so that nothing can be absorbed in closed '
      'form; use --recipe=prune_then_train or regularize, or none.'
    )


def replace_linear(model: Decoder, removed: Sequence[int], batches: Batches, mode: Mode, log=None) -> Decoder:
  """ReplaceMe's least squares (arXiv 2505.02819, section 2.2): a D × D map after the MLP, folded into W.

  T = argmin Σ ‖a·T − (target − m)‖², with a = f·W the MLP's output; W becomes W·T. As published: every token counts
  alike, no ridge (the solution of least norm where the map is not determined). Arguments as for `absorb`.
  """

  def solve(gram_DD, cross_DD):
    # a·(T − 1) has to make up what is lacking. By pinv: the outputs of few tokens do not span D.
    return np.linalg.pinv(gram_DD, rcond=1e-12, hermitian=True) @ cross_DD

  return _refit(model, removed, batches, mode, 'outputs', solve, lambda w_FD, delta_DD: w_FD + w_FD @ delta_DD, log)


def _refit(model: Decoder, removed, batches: Batches, mode: Mode, kind: str, solve, change, log: Callable | None):
  kept = prune.kept_layers(model.num_layers, removed)
  current, changed = jax.tree.map(lambda a: a, model), False
  for l, end in zip(kept, [*kept[1:], model.num_layers]):
    if end == l + 1:
      continue
    sums = 0.0, 0.0, 0.0, 0.0
    below_L = np.isin(np.arange(model.num_layers), [k for k in kept if k < l])
    for tokens_BT in batches:
      one = _sums(model, current, tokens_BT, below_L, l, end, mode, kind, changed)
      sums = tuple(total + hosts.to_host(a).astype(np.float64) for total, a in zip(sums, one))
    gram, cross, before, size = sums
    changed = True
    # Solved once: two processors' last bits may differ, and the devices must hold the same.
    delta = hosts.broadcast(solve(gram, cross) if hosts.leads() else np.zeros_like(cross))
    after = before - 2 * np.sum(delta * cross) + np.sum(delta * (gram @ delta))
    if log:
      log(l, end, float(before / size), float(after / size))
    w_LFD = current.layers.w_down.get_value()
    w_FD = change(hosts.to_host(w_LFD[l]).astype(np.float64), delta)
    current.layers.w_down.set_value(_with_layer(w_LFD, w_FD.astype(w_LFD.dtype), l))
  return prune.prune(current, removed)


def program(model: Decoder, tokens_BT, recipe: str, mode: Mode):
  """(jitted function, its arguments) of the heaviest step of a recipe; arrays may be abstract."""
  kind, l = 'features' if recipe.startswith('absorb') else 'outputs', np.int32(0)
  return _sums, (model, model, tokens_BT, np.ones(model.num_layers, bool), l, l + 1, mode, kind, True)


@functools.partial(jax.jit, static_argnames=('mode', 'kind', 'changed'))
def _sums(dense: Decoder, current: Decoder, tokens_BT, below_L, l, end, mode: Mode, kind: str, changed: bool):
  """(Σ w a·aᵀ, Σ w a·rᵀ, Σ w ‖r‖², Σ w ‖target‖²) in float32: a the features of layer l or, as kind says, its output."""
  layer_L, gate_L = jnp.arange(dense.num_layers), jnp.ones(dense.num_layers, jnp.float32)
  tables = model_lib.rope_tables(dense.spec, tokens_BT.shape[1])
  kind_l = {k: jnp.asarray(of_L)[l] for k, of_L in model_lib.kinds(dense.spec).items()}
  rope, window = model_lib.rope_and_window(dense.spec, tables, kind_l)
  run = lambda model, x_BTD, alive_L: model_lib.run_layers(model, x_BTD, alive_L, mode, gate_L)[0]
  embedded_BTD = model_lib.embed(dense, tokens_BT, mode)
  x_BTD = run(current, embedded_BTD, below_L)
  if changed:
    target_BTD = run(dense, embedded_BTD, layer_L < end)
  else:  # below l both are one
    target_BTD = run(dense, x_BTD, (l <= layer_L) & (layer_L < end))
  target_BTD = target_BTD.astype(jnp.float32)
  block = jax.tree.map(lambda a: a[l], current.layers)
  attn_BTD = block.attn_update(model_lib.attention(*block.qkv(x_BTD, rope), window, *dense.spec.scores()), x_BTD)
  mid_BTD = x_BTD + attn_BTD
  f_BTF = block.mlp_features(x_BTD, attn_BTD)
  out_BTD = block.mlp_update(f_BTF, mid_BTD)
  lacking_BTD = target_BTD - mid_BTD.astype(jnp.float32) - out_BTD.astype(jnp.float32)

  rows = lambda a: a.reshape(-1, a.shape[-1]).astype(jnp.float32)
  product_BTD = out_BTD if block.b_down is None else out_BTD - block.b_down[...].astype(out_BTD.dtype)[None, None]
  a_SA, r_SD, t_SD = rows(f_BTF if kind == 'features' else product_BTD), rows(lacking_BTD), rows(target_BTD)
  w_S1 = 1 / jnp.maximum(jnp.sum(t_SD**2, -1, keepdims=True), 1e-12)
  weighted_SA = a_SA * w_S1 if kind == 'features' else a_SA
  if kind != 'features':
    w_S1 = jnp.ones_like(w_S1)
  product = functools.partial(jnp.einsum, 'SA,SD->AD', precision=jax.lax.Precision.HIGHEST)
  gram, cross = product(weighted_SA, a_SA), product(weighted_SA, r_SD)
  return sharding.replicate((gram, cross, jnp.sum(w_S1 * r_SD**2), jnp.sum(w_S1 * t_SD**2)))


@jax.jit
def _with_layer(w_LFD, w_FD, l):
  return sharding.constrain(w_LFD.at[l].set(w_FD), *sharding.spec('LFD'))
