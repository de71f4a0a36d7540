"""Removal in closed form: the layer before each removed run of layers is refitted to write what the run would write.

Only what its MLP ends in changes, the down projection and the scale of a norm behind it, so that the pruned model is of
the stock architecture, with no new tensor. Needs forward passes and linear solves for each run of removed layers, no
gradients.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.devices import sharding
from elder_jax.model import pruning
from elder_jax.model.attention import attention
from elder_jax.model.attention import kinds
from elder_jax.model.attention import rope_and_window
from elder_jax.model.attention import rope_tables
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import embed
from elder_jax.model.decoder import run_layers
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.recipes.context import Batches
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

# Ridge of `absorb`, times the mean diagonal of its Gram matrix. Chosen on validation text: docs/decisions.md.
RIDGE = 0.1
# A down projection that a norm follows is refitted in rounds, by these parts of the text: the first has only to come near.
NORMED_ROUNDS = (0.25, 1.0)


def absorb(model: Decoder, removed: Sequence[int], batches: Batches, mode: Mode, log=None, free=None) -> Decoder:
  """The pruned model, in which the layers before the removed runs do these runs' work as far as they can.

  Of the layer before a run, f is what the down projection W_FD reads and r = target − (m + f·W) what the pruned stream
  lacks, with m the stream after the layer's attention and target the dense model's stream after the run. The change
  of W is the ridge solution
    ΔW = (Σ w f·fᵀ + λI)⁻¹ Σ w f·rᵀ,  w = 1 / ‖target‖²,  λ = RIDGE · the mean diagonal of Σ w f·fᵀ,
  the sums over all tokens: the error relative to the stream, as the next layer's norm reads it. Runs are worked off
  upwards, each on the stream that those below it really leave. Where a norm follows W: see _refit_normed.

  A run that begins at layer 0 has no layer before it and is only removed.

  Args:
    batches: tokens [B, T] on the devices.
    log: called with (layer, the run's end, relative squared error before, after) for each run.
    free: of prune.prune; unset, `model` is left as it is.
  """
  refit = _refit_normed if model.spec.block == 'sandwich' else functools.partial(_refit, kind='features')
  return _each_run(model, removed, batches, mode, refit, log, free)


def replace_linear(
  model: Decoder, removed: Sequence[int], batches: Batches, mode: Mode, log=None, free=None
) -> Decoder:
  """ReplaceMe's least squares (arXiv 2505.02819, section 2.2): a D × D map after the MLP, folded into W.

  T = argmin Σ ‖a·T − (target − m)‖², with a = f·W the MLP's output; W becomes W·T. As published: every token counts
  alike, no ridge (the solution of least norm where the map is not determined). Arguments as for `absorb`.
  """
  return _each_run(model, removed, batches, mode, functools.partial(_refit, kind='outputs'), log, free)


def start_absorbed(context: Context, choice: Choice) -> Decoder:
  """Recipe.start by `absorb`."""
  return absorb(context.model, choice.removed, context.fitted, context.mode, _said(context), context.free)


def start_replaced(context: Context, choice: Choice) -> Decoder:
  """Recipe.start by `replace_linear`."""
  return replace_linear(context.model, choice.removed, context.fitted, context.mode, _said(context), context.free)


def _said(context: Context) -> Callable:
  def say(layer: int, end: int, before: float, after: float):
    layers = f'layer {layer + 1}' if end == layer + 2 else f'layers {layer + 1}-{end - 1}'
    context.log.say(f'absorbed {layers} into layer {layer}: relative squared error {before:.3g} → {after:.3g}')

  return say


def why_not_absorb(spec: Spec) -> str:
  """Recipe.refuses: '' where what the MLP adds to the stream can be refitted in closed form."""
  return _why_not('prune_then_train or regularize, or none') if spec.block == 'post' else ''


def why_not_replace(spec: Spec) -> str:
  """Recipe.refuses of replace_linear, which cannot refit a norm either."""
  others = 'absorb, ' if spec.block == 'sandwich' else ''
  return _why_not(f'{others}prune_then_train or regularize, or none') if spec.block in ('post', 'sandwich') else ''


def _why_not(others: str) -> str:
  return (
    'layers of this family normalise the output of their MLP, so that no linear map can be folded into it; use '
    f'--recipe={others}.'
  )


def _each_run(model: Decoder, removed, batches: Batches, mode: Mode, refit: Callable, log: Callable | None, free):
  """Changes the layer before each removed run by refit(totals, current, l) -> errors, upwards; then removes them."""
  kept = pruning.kept_layers(model.num_layers, removed)
  current, changed = jax.tree.map(lambda a: a, model), False
  for l, end in zip(kept, [*kept[1:], model.num_layers]):
    if end == l + 1:
      continue
    below_L = np.isin(np.arange(model.num_layers), [k for k in kept if k < l])
    totals = functools.partial(_totals, batches, model, current, below_L, l, end, mode=mode, changed=changed)
    before, after = refit(totals, current, l)
    changed = True
    if log:
      log(l, end, float(before), float(after))
  # What was refitted is not the model's, and is not needed any more in any case.
  return pruning.prune(current, removed, free or functools.partial(memory.free, spare=model))


def _totals(
  batches: Batches, model, current, below_L, l, end, sums: Callable, *args, mode: Mode, changed: bool, part: float = 1.0
) -> list:
  """sums(…), one of the functions below, added up over the batches, or the first part of them, in float64."""
  total = None
  for tokens_BT in itertools.islice(batches, math.ceil(part * len(batches))):
    parts = sums(model, current, tokens_BT, below_L, l, end, *args, mode=mode, changed=changed)
    parts = [hosts.to_host(a).astype(np.float64) for a in parts]
    total = parts if total is None else [t + a for t, a in zip(total, parts)]
  return total


def _ridge(gram_FF, cross_FD):
  ridge = RIDGE * np.trace(gram_FF) / len(gram_FF)
  return np.linalg.solve(gram_FF + ridge * np.eye(len(gram_FF)), cross_FD)


def _least_squares(gram_DD, cross_DD):
  # By pinv: the outputs of few tokens do not span D.
  return np.linalg.pinv(gram_DD, rcond=1e-12, hermitian=True) @ cross_DD


def _solve_once(solve: Callable, gram, cross):
  """By process 0 for all: two processors' last bits may differ, and the devices must hold the same."""
  return hosts.broadcast(solve(gram, cross) if hosts.is_leader() else np.zeros_like(cross))


def _refit(totals: Callable, current: Decoder, l: int, kind: str) -> tuple[float, float]:
  """The down projection of layer l by one linear solve. Returns the relative squared error before and after."""
  gram, cross, before, size = totals(functools.partial(_linear_sums, kind=kind))
  w_FD = _layer(current.layers.w_down, l)
  if kind == 'features':
    delta = _solve_once(_ridge, gram, cross)
    w_FD = w_FD + delta
  else:  # a·(T − 1) has to make up what is lacking
    delta = _solve_once(_least_squares, gram, cross)
    w_FD = w_FD + w_FD @ delta
  _put(current.layers.w_down, w_FD, l)
  return before / size, (before - 2 * np.sum(delta * cross) + np.sum(delta * (gram @ delta))) / size


def _refit_normed(totals: Callable, current: Decoder, l: int) -> tuple[float, float]:
  """`absorb` of a block whose MLP ends in a norm, s ⊙ n(f·W) with n(u) = u / ρ, ρ = the root of u's mean square.

  With ρ held fixed for each token the update is linear in W, with W held fixed it is linear in s:
    1. s = κ, the root of the weighted mean square of each channel of r = target − m; W becomes W ∘ (s_before / κ),
       which changes no direction, so that n sees channels of like size;
    2. in each round ΔW = the ridge solution, as in `absorb`, of (f / ρ)·ΔW = r / κ − n(f·W);
    3. s_d = Σ w r_d n_d / Σ w n_d², each channel for itself.
  A token's norm of the update cannot be had, its direction and each channel's size can. Step 1 reads as much text as
  the first round, step 3 all. The error before is that on the text of step 1.
  """
  w_down, scale = current.layers.w_down, current.layers.post_mlp_norm.scale
  offset = 1.0 if current.layers.post_mlp_norm.kind == 'rms1' else 0.0  # the scale is stored without it
  r2_D, ry_D, y2_D, size, weight = totals(_channel_sums, part=NORMED_ROUNDS[0])
  before = np.sum(r2_D - 2 * ry_D + y2_D) / size
  kappa_D = np.sqrt(np.maximum(r2_D / weight, 1e-30))
  _put(w_down, _layer(w_down, l) * ((_layer(scale, l) + offset) / kappa_D), l)
  _put(scale, np.ones_like(kappa_D) - offset, l)  # so that the block gives n
  for part in NORMED_ROUNDS:
    delta = _solve_once(_ridge, *totals(_normed_sums, kappa_D.astype(np.float32), part=part))
    _put(w_down, _layer(w_down, l) + delta, l)
  r2_D, rn_D, n2_D, size, _ = totals(_channel_sums)
  s_D = rn_D / np.maximum(n2_D, 1e-30)  # a channel that no layer writes to stays so
  _put(scale, s_D - offset, l)
  return before, np.sum(r2_D - 2 * s_D * rn_D + s_D**2 * n2_D) / size


def _layer(weight, l: int) -> np.ndarray:
  return hosts.to_host(weight.get_value()[l]).astype(np.float64)


def _put(weight, value: np.ndarray, l: int):
  """Sets a layer of a stacked parameter."""
  stacked = weight.get_value()
  weight.set_value(_with_layer(stacked, value.astype(stacked.dtype), l, weight.get_metadata()['axes']))


@functools.partial(jax.jit, static_argnames='axes')
def _with_layer(stacked, value, l, axes: str):
  return sharding.constrain(stacked.at[l].set(value), *sharding.spec(axes))


# ---- sums over the tokens of a batch, float32 ----


def programs_absorb(shapes: Shapes) -> list[Program]:
  """Recipe.programs."""
  if shapes.spec.block == 'sandwich':
    return [_program(shapes, 'absorb', _normed_sums, np.ones(shapes.spec.d_model, np.float32), shapes.mode, True)]
  return [_program(shapes, 'absorb', _linear_sums, shapes.mode, True, 'features')]


def programs_replace(shapes: Shapes) -> list[Program]:
  """Recipe.programs."""
  return [_program(shapes, 'replace_linear', _linear_sums, shapes.mode, True, 'outputs')]


def _program(shapes: Shapes, name: str, sums: Callable, *args) -> Program:
  dense, l = shapes.dense, np.int32(0)
  arrays = dense, dense, shapes.tokens_BT, np.ones(shapes.num_layers, bool), l, l + 1
  size, changed = device_bytes(dense), device_bytes(dense.layers.w_down)  # all else is shared with the dense model
  calls = shapes.settings.fitted_steps
  return Program(name, sums, (*arrays, *args), shapes.flops(), size + changed, twice=size - changed, calls=calls)


def _parts(dense: Decoder, current: Decoder, tokens_BT, below_L, l, end, mode: Mode, changed: bool):
  """(layer l, f_BTF: what its down projection reads, m_BTD: the stream after its attention, target_BTD in float32)."""
  layer_L, gate_L = jnp.arange(dense.num_layers), jnp.ones(dense.num_layers, jnp.float32)
  tables = rope_tables(dense.spec, tokens_BT.shape[1])
  kind_l = {k: jnp.asarray(of_L)[l] for k, of_L in kinds(dense.spec).items()}
  rope, window = rope_and_window(dense.spec, tables, kind_l)

  def run(model, x_BTD, alive_L):
    return run_layers(model, x_BTD, alive_L, mode, gate_L)[0]

  embedded_BTD = embed(dense, tokens_BT, mode)
  x_BTD = run(current, embedded_BTD, below_L)
  if changed:
    target_BTD = run(dense, embedded_BTD, layer_L < end)
  else:  # below l both are one
    target_BTD = run(dense, x_BTD, (l <= layer_L) & (layer_L < end))
  block = jax.tree.map(lambda a: a[l], current.layers)
  attn_BTD = block.attn_update(attention(*block.qkv(x_BTD, rope), window, *dense.spec.scores()), x_BTD)
  return block, block.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD, target_BTD.astype(jnp.float32)


def _rows(a):
  return a.reshape(-1, a.shape[-1]).astype(jnp.float32)


def _weights(target_SD):
  return 1 / jnp.maximum(jnp.sum(target_SD**2, -1, keepdims=True), 1e-12)


_product = functools.partial(jnp.einsum, 'SA,SD->AD', precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=('mode', 'changed', 'kind'))
def _linear_sums(dense, current, tokens_BT, below_L, l, end, mode: Mode, changed: bool, kind: str):
  """(Σ w a·aᵀ, Σ w a·rᵀ, Σ w ‖r‖², Σ w ‖target‖²): a the features of layer l or, as kind says, its output (w = 1)."""
  block, f_BTF, mid_BTD, target_BTD = _parts(dense, current, tokens_BT, below_L, l, end, mode, changed)
  out_BTD = block.mlp_update(f_BTF, mid_BTD)
  r_SD = _rows(target_BTD - mid_BTD.astype(jnp.float32) - out_BTD.astype(jnp.float32))
  t_SD = _rows(target_BTD)
  if kind == 'features':
    a_SA, w_S1 = _rows(f_BTF), _weights(t_SD)
  else:
    product_BTD = out_BTD if block.b_down is None else out_BTD - block.b_down[...].astype(out_BTD.dtype)[None, None]
    a_SA, w_S1 = _rows(product_BTD), jnp.ones((t_SD.shape[0], 1))
  weighted_SA = a_SA * w_S1
  gram, cross = _product(weighted_SA, a_SA), _product(weighted_SA, r_SD)
  return sharding.replicate((gram, cross, jnp.sum(w_S1 * r_SD**2), jnp.sum(w_S1 * t_SD**2)))


@functools.partial(jax.jit, static_argnames=('mode', 'changed'))
def _normed_sums(dense, current, tokens_BT, below_L, l, end, kappa_D, mode: Mode, changed: bool):
  """(Σ w a·aᵀ, Σ w a·(r/κ − n)ᵀ) with a = f/ρ; the norm's scale is 1. See _refit_normed."""
  block, f_BTF, mid_BTD, target_BTD = _parts(dense, current, tokens_BT, below_L, l, end, mode, changed)
  n_SD, u_SD = _rows(block.mlp_update(f_BTF, mid_BTD)), _rows(block.mlp_output(f_BTF))
  a_SF = _rows(f_BTF) * jax.lax.rsqrt(jnp.mean(u_SD * u_SD, -1, keepdims=True) + block.post_mlp_norm.eps)
  wanted_SD = _rows(target_BTD - mid_BTD.astype(jnp.float32)) / kappa_D[None]
  weighted_SF = a_SF * _weights(_rows(target_BTD))
  return sharding.replicate((_product(weighted_SF, a_SF), _product(weighted_SF, wanted_SD - n_SD)))


@functools.partial(jax.jit, static_argnames=('mode', 'changed'))
def _channel_sums(dense, current, tokens_BT, below_L, l, end, mode: Mode, changed: bool):
  """(Σ w r², Σ w r y, Σ w y² of each channel; Σ w ‖target‖², Σ w): y what the MLP adds, r what it should add."""
  block, f_BTF, mid_BTD, target_BTD = _parts(dense, current, tokens_BT, below_L, l, end, mode, changed)
  y_SD, r_SD = _rows(block.mlp_update(f_BTF, mid_BTD)), _rows(target_BTD - mid_BTD.astype(jnp.float32))
  t_SD = _rows(target_BTD)
  w_S1 = _weights(t_SD)

  def of_D(a_SD, b_SD):
    return jnp.sum(w_S1 * a_SD * b_SD, 0)

  return sharding.replicate(
    (of_D(r_SD, r_SD), of_D(r_SD, y_SD), of_D(y_SD, y_SD), jnp.sum(w_S1 * t_SD**2), jnp.sum(w_S1))
  )
