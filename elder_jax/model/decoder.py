"""The decoder: stacked layers under one scan, a gate per layer, the norms of the layers' updates as outputs.

Dimensions, as used in the names' suffixes:
  B batch, T token, L layer, D model width, N query heads, K key/value heads, G query heads per key/value head,
  H head width, F feed-forward width, V vocabulary.

The modules are Flax NNX modules used as typed pytrees: every function here is pure, and goes under jax.jit, jax.grad
and jax.lax.scan as it stands. A parameter's axes are written once, where it is made, and serve its shape, its
initialisation, its sharding (sharding.py) and its slicing (prune.py).
"""

from collections.abc import Callable
import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model import lora

QUERY_BLOCK = {'cpu': 128, 'tpu': 512}  # queries that attend together where there is no fused kernel


@dataclasses.dataclass(frozen=True)
class Spec:
  """What the family's config says of the computation, the number of layers apart (that is the weights' own).

  What follows after `rope_freq_RH` are the features in which families differ, at what Llama does.
  """

  vocab_size: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float
  tied: bool  # the output head is the embedding
  # Radians per position, one for each rotated pair of a head's dimensions; what is not rotated comes after these. A
  # table for each kind of layer; zeros: the layer knows no positions; of length 0: no layer rotates.
  rope_freq_RH: tuple[tuple[float, ...], ...]
  # Per layer, sliced with the layers. Empty: 0 everywhere.
  rope_L: tuple[int, ...] = ()  # which table
  window_L: tuple[int, ...] = ()  # how many of the last tokens, its own included, a token sees; 0: all
  norm: str = 'rms'  # rms; rms1: RMSNorm that scales by 1 + w; layer: LayerNorm
  # pre:      h = x + attn(norm(x)), y = h + mlp(norm(h))        parallel: y = x + attn(norm(x)) + mlp(norm(x))
  # sandwich: pre, with a norm on what each of both adds         post:     h = norm(x + attn(x)), y = norm(h + mlp(h))
  block: str = 'pre'
  shared_norm: bool = False  # parallel: both read the same norm
  final_norm: bool = True
  qk_norm: bool = False  # an RMSNorm over each head's query and key
  activation: str = 'silu'
  gated_mlp: bool = True  # activation(gate) · up; else activation(up)
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  num_positions: int = 0  # learned position embeddings; 0: none
  position_offset: int = 0  # the row of the first token's
  embed_scale: float = 1.0
  attn_scale: float | None = None  # of the scores; None: head_dim ** -0.5
  attn_softcap: float | None = None  # scores s become cap · tanh(s / cap)
  final_softcap: float | None = None  # the same of the logits

  def sizes(self, num_layers: int) -> dict[str, int]:
    return {
      'L': num_layers,
      'V': self.vocab_size,
      'D': self.d_model,
      'N': self.num_heads,
      'K': self.num_kv_heads,
      'H': self.head_dim,
      'F': self.d_ff,
      'P': self.num_positions + self.position_offset,
    }

  def scores(self) -> tuple[float | None, float | None]:
    """`attention`'s scale and cap."""
    return self.attn_scale, self.attn_softcap

  def with_layers(self, kept: list[int]) -> 'Spec':
    """The spec of the model that has only the layers `kept`."""
    cut = lambda of_L: tuple(of_L[l] for l in kept) if of_L else ()
    return dataclasses.replace(self, rope_L=cut(self.rope_L), window_L=cut(self.window_L))


@dataclasses.dataclass(frozen=True)
class Mode:
  """How `forward` computes; static under jit."""

  gate: str = 'residual'  # residual: x + g·d; output: g·(x + d)
  penalty: str = 'l2'  # the norm of d: l2 or l1
  penalty_scale: str = 'token'  # token, relative or none: see delta_norm
  dtype: str = 'float32'  # of activations and of the weights where they are used
  remat: str = 'none'  # what the backward pass computes again: none, dots, dots_no_batch or full


# weight(axes, fan_in) -> parameter. `fan_in` names the axes that are summed over; a number: all are this.
Weight = Callable[[str, str | float], nnx.Param]


def _weight_maker(spec: Spec, num_layers: int, key: jax.Array) -> Weight:
  sizes, keys = spec.sizes(num_layers), iter(jax.random.split(key, 16))

  def weight(axes: str, fan_in: str | float) -> nnx.Param:
    shape = tuple(sizes[a] for a in axes)
    if not isinstance(fan_in, str):
      return nnx.Param(jnp.full(shape, fan_in, jnp.float32), axes=axes)
    scale = np.prod([sizes[a] for a in fan_in]) ** -0.5
    return nnx.Param(scale * jax.random.normal(next(keys), shape), axes=axes)

  return weight


class Norm(nnx.Module):
  """The scale of a norm, and of a LayerNorm also the bias; with the leading L kept, those of all layers."""

  def __init__(self, spec: Spec, weight: Weight, axes: str, kind: str | None = None):
    self.kind, self.eps = kind or spec.norm, spec.norm_eps
    self.scale = weight(axes, 0.0 if self.kind == 'rms1' else 1.0)
    self.bias = weight(axes, 0.0) if self.kind == 'layer' else None

  def __call__(self, x_BTD):
    """Computed in float32; over the last axis of x, whatever is before it."""
    if self.kind == 'rms':
      return rms_norm(x_BTD, _whole(self.scale), self.eps)
    x32_BTD = x_BTD.astype(jnp.float32)
    if self.kind == 'rms1':
      x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + self.eps)
      return (x32_BTD * _wide(1 + _whole(self.scale).astype(jnp.float32), x_BTD)).astype(x_BTD.dtype)
    x32_BTD = x32_BTD - jnp.mean(x32_BTD, -1, keepdims=True)
    x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + self.eps)
    scale_D, bias_D = (_wide(_whole(p).astype(jnp.float32), x_BTD) for p in (self.scale, self.bias))
    return (x32_BTD * scale_D + bias_D).astype(x_BTD.dtype)


class Block(nnx.Module):
  """One layer's weights; with the leading L kept, those of all layers, to be scanned over."""

  def __init__(self, spec: Spec, weight: Weight):
    self.spec = spec
    norm = lambda axes='LD', kind=None: Norm(spec, weight, axes, kind)
    bias = lambda there, axes: weight(axes, 0.0) if there else None
    self.attn_norm = norm()
    self.wq = weight('LDNH', 'D')
    self.wk = weight('LDKH', 'D')
    self.wv = weight('LDKH', 'D')
    self.bq, self.bk, self.bv = (bias(spec.qkv_bias, axes) for axes in ('LNH', 'LKH', 'LKH'))
    self.q_norm, self.k_norm = (norm('LH') if spec.qk_norm else None for _ in 'qk')
    self.wo = weight('LNHD', 'NH')
    self.bo = bias(spec.out_bias, 'LD')
    self.mlp_norm = None if spec.shared_norm else norm()
    self.w_gate = weight('LDF', 'D') if spec.gated_mlp else None
    self.b_gate = bias(spec.mlp_bias and spec.gated_mlp, 'LF')
    self.w_up = weight('LDF', 'D')
    self.b_up = bias(spec.mlp_bias, 'LF')
    self.w_down = weight('LFD', 'F')
    self.b_down = bias(spec.mlp_bias, 'LD')
    self.post_attn_norm, self.post_mlp_norm = (norm() if spec.block == 'sandwich' else None for _ in 'am')

  def qkv(self, x_BTD, rope):
    """Queries [B, T, N, H], keys and values [B, T, K, H] of this layer, the first two rotated."""
    h_BTD = x_BTD if self.spec.block == 'post' else self.attn_norm(x_BTD)
    project = lambda w, b, axes: _plus(_product(f'BTD,D{axes}->BT{axes}', h_BTD, w), b)
    q_BTNH, k_BTKH = project(self.wq, self.bq, 'NH'), project(self.wk, self.bk, 'KH')
    if self.spec.qk_norm:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope), project(self.wv, self.bv, 'KH')

  def attn_update(self, attended_BTNH, x_BTD):
    """What attention adds to the stream x_BTD that this layer read."""
    out_BTD = _plus(_product('BTNH,NHD->BTD', attended_BTNH, self.wo), self.bo)
    if self.spec.block == 'post':
      return self.attn_norm(x_BTD + out_BTD) - x_BTD
    return self.post_attn_norm(out_BTD) if self.spec.block == 'sandwich' else out_BTD

  def mlp_features(self, x_BTD, attn_BTD):
    """What the down projection reads, [B, T, F], where attention added attn_BTD to x_BTD."""
    block = self.spec.block
    h_BTD = x_BTD if block == 'parallel' else x_BTD + attn_BTD
    if block != 'post':
      h_BTD = (self.attn_norm if self.spec.shared_norm else self.mlp_norm)(h_BTD)
    act = ACTIVATIONS[self.spec.activation]
    project = lambda w, b: _plus(_product('BTD,DF->BTF', h_BTD, w), b)
    if self.spec.gated_mlp:
      return act(project(self.w_gate, self.b_gate)) * project(self.w_up, self.b_up)
    return act(project(self.w_up, self.b_up))

  def mlp_output(self, f_BTF):
    """What the down projection gives, before a norm that a block may have there."""
    return _plus(_product('BTF,FD->BTD', f_BTF, self.w_down), self.b_down)

  def mlp_update(self, f_BTF, mid_BTD):
    """What the MLP adds to mid_BTD, the stream after attention."""
    out_BTD = self.mlp_output(f_BTF)
    if self.spec.block == 'post':
      return self.mlp_norm(mid_BTD + out_BTD) - mid_BTD
    return self.post_mlp_norm(out_BTD) if self.spec.block == 'sandwich' else out_BTD

  def updates(self, x_BTD, attended_BTNH):
    """(what attention adds to the stream, what the MLP adds), from what attention gave before its out projection."""
    attn_BTD = self.attn_update(attended_BTNH, x_BTD)
    return attn_BTD, self.mlp_update(self.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD)

  def __call__(self, x_BTD, gate, rope, mode: Mode, window=None):
    """One gated layer: (x_BTD, gate as an fp32 scalar) -> (next x_BTD, the layer's own update d_BTD, ungated)."""
    attn_BTD, mlp_BTD = self.updates(x_BTD, attention(*self.qkv(x_BTD, rope), window, *self.spec.scores()))
    # Added in the order of the ungated network, so that a gate of 1 changes no bit and a gate of 0 leaves x alone.
    if mode.gate == 'residual':
      y_BTD = (x_BTD + gate * attn_BTD) + gate * mlp_BTD
    else:
      y_BTD = gate * ((x_BTD + attn_BTD) + mlp_BTD)
    return y_BTD.astype(x_BTD.dtype), attn_BTD + mlp_BTD


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': jax.nn.gelu,
  'relu': jax.nn.relu,
}


def _plus(x, bias: nnx.Param | None):
  """x + bias, the bias on x's last axes."""
  return x if bias is None else x + _wide(_whole(bias, x.dtype), x)


def _wide(a, like):
  return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def _cast(weight: nnx.Param, like):
  return _whole(weight, like.dtype)


def _whole(param: nnx.Param, dtype=None):
  """A parameter for use: in the type that is computed in, and only then gathered from the devices that share it."""
  value = param[...]
  return sharding.gather(value if dtype is None else value.astype(dtype), param.get_metadata()['axes'])


def _product(equation: str, x, weight: nnx.Param | lora.Lora):
  """jnp.einsum of x and a layer's matrix, in the type of x."""
  if isinstance(weight, lora.Lora):
    return lora.product(equation, weight.scale, x, _cast(weight.base, x), _whole(weight.a), _whole(weight.b))
  return jnp.einsum(equation, x, _cast(weight, x))


class Decoder(nnx.Module):
  """A decoder-only transformer. `gate_L` (fp32) holds one gate per layer; at 1 the network is the ungated one."""

  def __init__(self, spec: Spec, num_layers: int, key: jax.Array):
    assert {len(of_L) for of_L in (spec.rope_L, spec.window_L)} <= {0, num_layers}
    weight = _weight_maker(spec, num_layers, key)
    self.spec = spec
    self.embed = weight('VD', 'D')
    self.positions = weight('PD', 'D') if spec.num_positions else None
    self.layers = Block(spec, weight)
    self.gate_L = nnx.Param(jnp.ones(num_layers, jnp.float32), axes='L')
    self.final_norm = Norm(spec, weight, 'D') if spec.final_norm else None
    self.head = None if spec.tied else weight('VD', 'D')
    self.head_bias = weight('V', 0.0) if spec.head_bias else None

  @property
  def num_layers(self) -> int:
    return self.gate_L.get_value().shape[0]


def forward(model: Decoder, tokens_BT, alive_L=None, mode: Mode = Mode(), gate_L=None):
  """Runs the network up to the final norm.

  Args:
    tokens_BT: int32 token ids.
    alive_L: bool; a layer that is not alive is skipped: the identity, at no cost. None: all are alive.
    mode: see Mode.
    gate_L: gates (fp32) in place of the model's own.

  Returns:
    x_BTD in the compute type, to be given to `logits` or to losses.next_token_nll, and delta_L (fp32), the norm of
    each layer's update as mode.penalty and mode.penalty_scale define it; 0 for a skipped layer.
  """
  x_BTD, delta_L = run_layers(model, embed(model, tokens_BT, mode), alive_L, mode, gate_L)
  return final(model, x_BTD), delta_L


def embed(model: Decoder, tokens_BT, mode: Mode = Mode(), position_T=None, batch_axis: int = 0):
  """The stream x_BTD that the first layer reads.

  Args:
    position_T: the tokens' positions; 0 … T − 1 where it is not given.
    batch_axis: that of tokens_BT which lies over the devices.
  """
  spec = model.spec
  # Devices that share the width look up their part of it for each other's tokens, and exchange that: the table stays.
  over = lambda axis, *width: (*(axis if i == batch_axis else None for i in range(2)), *width)
  tokens_BT = sharding.constrain(tokens_BT, *over('data'))
  x_BTD = jnp.take(model.embed[...], tokens_BT, axis=0).astype(mode.dtype)
  x_BTD = sharding.constrain_batch(sharding.constrain(x_BTD, *over('data', 'fsdp')), batch_axis)
  if spec.embed_scale != 1:
    x_BTD = x_BTD * jnp.asarray(spec.embed_scale, mode.dtype)
  if spec.num_positions:
    position_T = jnp.arange(tokens_BT.shape[1]) if position_T is None else position_T
    # Padding may lie beyond the table. Without clip it would read NaN, and attention to it of weight 0 is NaN as well.
    p_TD = jnp.take(_whole(model.positions), position_T + spec.position_offset, axis=0, mode='clip')
    x_BTD = x_BTD + p_TD[None].astype(mode.dtype)
  return x_BTD


def final(model: Decoder, x_BTD):
  """The final norm."""
  return x_BTD if model.final_norm is None else model.final_norm(x_BTD)


def run_layers(model: Decoder, x_BTD, alive_L=None, mode: Mode = Mode(), gate_L=None, inputs: bool = False):
  """The layers alone, from the stream x_BTD at position 0 on; arguments as in `forward`.

  To run only the layers above some layer, give that layer's input and an alive_L that is False below.

  Returns:
    (x_BTD after the last layer, before the final norm; delta_L), and with `inputs` also x_LBTD, what each layer read.
  """
  if alive_L is None:
    # Behind a barrier, else the compiler drops the branch below, fuses otherwise, and some last bits differ.
    alive_L = jax.lax.optimization_barrier(jnp.ones(model.num_layers, bool))
  gate_L = model.gate_L[...] if gate_L is None else gate_L
  tables = rope_tables(model.spec, x_BTD.shape[1])

  def layer(x_BTD, scanned):
    block, gate, alive, kind = scanned

    def run(x_BTD):
      rope, window = rope_and_window(model.spec, tables, kind)
      y_BTD, d_BTD = block(x_BTD, gate, rope, mode, window)
      return y_BTD, delta_norm(d_BTD, x_BTD, mode.penalty, mode.penalty_scale)

    if mode.remat == 'full':
      # Inside the branch as well: else the backward pass computes the layer again in one branch and takes what it needs,
      # the scores of attention among it, through memory into another.
      run = jax.checkpoint(run)
    y_BTD, delta = jax.lax.cond(alive, run, lambda x_BTD: (x_BTD, jnp.float32(0)), x_BTD)
    return sharding.constrain_batch(y_BTD), (delta, x_BTD) if inputs else delta

  if mode.remat == 'full':
    layer = jax.checkpoint(layer)
  elif mode.remat == 'dots':
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.checkpoint_dots)
  elif mode.remat == 'dots_no_batch':
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
  elif sharding.batch_ways() > 1:
    layer = jax.checkpoint(layer, policy=_all_but_weights)
  x_BTD, out = jax.lax.scan(layer, sharding.constrain_batch(x_BTD), (model.layers, gate_L, alive_L, kinds(model.spec)))
  return (x_BTD, *out) if inputs else (x_BTD, out)


def _all_but_weights(primitive, *_, **params) -> bool:
  """Remat policy: what a layer computes is kept, weights that it cast and gathered are not, else all are whole at once."""
  return primitive.name not in ('convert_element_type', 'sharding_constraint', 'custom_vjp_call')  # sharding.gather's


def head(model: Decoder):
  """The output head (weights_VD, float32 bias_V or None), gathered for `logits`: once, where that is called in a loop."""
  weights_VD = _whole(model.embed if model.head is None else model.head)
  return weights_VD, None if model.head_bias is None else _whole(model.head_bias, jnp.float32)


def logits(model: Decoder, x_BTD, gathered=None):
  """float32 logits_BTV of `forward`'s hidden states. For a loss use losses.next_token_nll, which never holds them all."""
  return project(head(model) if gathered is None else gathered, x_BTD, model.spec.final_softcap)


def project(gathered, x_BTD, cap: float | None):
  """`logits`, by the head as `head` gives it and the cap of its model's spec."""
  weights_VD, bias_V = gathered
  out_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, weights_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  return softcap(out_BTV if bias_V is None else out_BTV + _wide(bias_V, out_BTV), cap)


def softcap(a, cap: float | None):
  return a if cap is None else cap * jnp.tanh(a / cap)


def delta_norm(d_BTD, x_BTD, penalty: str, scale: str):
  """The size of a layer's update d = f(x) − x as one fp32 scalar (METHOD: ELDeR, arXiv 2505.18232, section 3.3).

  penalty: l2, the unsquared Euclidean norm, or l1, the sum of absolute values.
  scale:   token, the mean over tokens of each token's norm; relative, the same after division by the norm of the
           token's x (as a constant: no gradient goes to x through it); none, the norm of the whole [B, T, D] at once.
  The gradient at d = 0 is 0, not NaN.
  """
  d_BTD = d_BTD.astype(jnp.float32)

  def norm(a, axis):
    if penalty == 'l1':
      return jnp.sum(a * jnp.sign(a), axis)  # jnp.abs has the gradient 1 at 0
    squares = jnp.sum(a * a, axis)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)

  if scale == 'none':
    return norm(d_BTD, None)
  d_BT = norm(d_BTD, -1)
  if scale == 'relative':
    x_BT = norm(jax.lax.stop_gradient(x_BTD).astype(jnp.float32), -1)
    d_BT = d_BT / jnp.maximum(x_BT, 1e-6)
  return jnp.mean(d_BT)


def rms_norm(x_BTD, scale_D, eps: float):
  """RMSNorm, computed in float32."""
  x32_BTD = x_BTD.astype(jnp.float32)
  x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + eps)
  return x32_BTD.astype(x_BTD.dtype) * _wide(scale_D.astype(x_BTD.dtype), x_BTD)


# ---- where a layer's attention looks ----


def kinds(spec: Spec) -> dict:
  """What differs between the layers, as int32_L to be scanned over; empty where all are alike."""
  window_L = [w or NO_WINDOW for w in spec.window_L]
  return {k: np.array(a, np.int32) for k, a in (('rope', spec.rope_L), ('window', window_L)) if len(set(a)) > 1}


def rope_and_window(spec: Spec, tables, kind: dict):
  """A layer's (cos_TH, sin_TH) of rope_tables, and its window or None; kind: what `kinds` gave for it."""
  row = kind.get('rope', spec.rope_L[0] if spec.rope_L else 0)
  window = kind.get('window', spec.window_L[0] or None if spec.window_L else None)
  return tuple(table_RTH[row] for table_RTH in tables), window


NO_WINDOW = 2**30  # where layers differ, one that sees all


def rope_tables(spec: Spec, num_tokens: int):
  """(cos_RTH, sin_RTH) of the positions 0 … num_tokens − 1 in float32, half as wide as what is rotated of a head."""
  return rope_at(spec, jnp.arange(num_tokens))


def rope_at(spec: Spec, position_T):
  """rope_tables' rows of any positions."""
  freq_RH = jnp.array(spec.rope_freq_RH, jnp.float32)
  angle_RTH = position_T.astype(jnp.float32)[None, :, None] * freq_RH[:, None]
  return jnp.cos(angle_RTH), jnp.sin(angle_RTH)


def apply_rope(x_BTNH, rope):
  """Rotates the pairs (i, i + R/2) of each head's first R dimensions, Hugging Face's layout, in float32."""
  cos, sin = (table_TH[None, :, None, :] for table_TH in rope)
  half, H = cos.shape[-1], x_BTNH.shape[-1]
  if not half:
    return x_BTNH
  a, b = jnp.split(x_BTNH[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
  return rotated if 2 * half == H else jnp.concatenate([rotated, x_BTNH[..., 2 * half :]], -1)


def attention(q_BTNH, k_BTKH, v_BTKH, window=None, scale: float | None = None, cap: float | None = None):
  """Causal attention [B, T, N, H]; query head n reads key/value head n // (N/K). cuDNN's fused kernel on a GPU.

  Args:
    window: how many of the last tokens, its own included, a token sees; a number, an int32 scalar, or None: all.
    scale: of the scores; None: H ** -0.5.
    cap: scores s become cap · tanh(s / cap).
  """
  backend, T = sharding.platform(), q_BTNH.shape[1]
  plain = cap is None and (window is None or isinstance(window, int))
  if backend == 'gpu' and plain:
    H = q_BTNH.shape[-1]
    fused = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and H <= 128 and H % 8 == 0  # what cuDNN has on all GPUs
    implementation = 'cudnn' if fused else 'xla'
    local = None if window is None or window >= T else (window - 1, 0)
    return jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      is_causal=True,
      scale=scale,
      local_window_size=local,
      implementation=implementation,
    )
  # Without a fused kernel: blocks of queries that do not read the keys after them take half the time of the square.
  size = QUERY_BLOCK.get(backend, T)
  blocks = []
  for start in range(0, T, size):
    end = min(T, start + size)
    first = max(0, start - window + 1) if isinstance(window, int) else 0
    back_ts = jnp.arange(start, end)[:, None] - jnp.arange(first, end)[None]
    seen_ts = back_ts >= 0 if window is None else (back_ts >= 0) & (back_ts < window)
    blocks.append(
      masked_attention(
        q_BTNH[:, start:end], k_BTKH[:, first:end], v_BTKH[:, first:end], seen_ts[None, None], scale, cap
      )
    )
  return jnp.concatenate(blocks, axis=1)


def masked_attention(q_BTNH, k_BSKH, v_BSKH, seen_BNTS, scale: float | None = None, cap: float | None = None):
  """Attention [B, T, N, H] of queries to the keys that `seen` shows them; axes of 1 in it are broadcast."""
  if cap is None:
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=seen_BNTS, scale=scale, implementation='xla')
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  scale = H**-0.5 if scale is None else scale
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  score_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
  score_BKGTS = jnp.where(seen_BNTS[:, :, None], softcap(score_BKGTS, cap), -jnp.inf)
  p_BKGTS = jax.nn.softmax(score_BKGTS, -1).astype(v_BSKH.dtype)
  return jnp.einsum('BKGTS,BSKH->BTKGH', p_BKGTS, v_BSKH).reshape(B, T, N, H)
