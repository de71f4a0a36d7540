"""One layer: its parameters and its computation.

The axes of a parameter are written once, where it is created. Shape, initialisation, sharding (devices/sharding.py) and
removal of layers (pruning.py) all use them. Dimension names: see decoder.py.
"""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model import delta
from elder_jax.model import experts
from elder_jax.model import lora
from elder_jax.model import products
from elder_jax.model.attention import apply_rope
from elder_jax.model.attention import attention
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec

# weight(axes, fan_in) -> parameter. fan_in: the axes that are summed over, or a number that fills the parameter.
Weight = Callable[[str, str | float], nnx.Param]


def weight_maker(spec: Spec, num_layers: int, key: jax.Array) -> Weight:
  sizes, keys = spec.sizes(num_layers), iter(jax.random.split(key, 16))

  def weight(axes: str, fan_in: str | float) -> nnx.Param:
    shape = tuple(sizes[a] for a in axes)
    if not isinstance(fan_in, str):
      return nnx.Param(jnp.full(shape, fan_in, jnp.float32), axes=axes)
    scale = np.prod([sizes[a] for a in fan_in]) ** -0.5
    return nnx.Param(scale * jax.random.normal(next(keys), shape), axes=axes)

  return weight


class Norm(nnx.Module):
  """RMSNorm or LayerNorm: a scale, and for LayerNorm a bias. With a leading axis L it holds those of all layers."""

  def __init__(self, spec: Spec, weight: Weight, axes: str, kind: str | None = None):
    self.kind, self.eps = kind or spec.norm, spec.norm_eps
    self.scale = weight(axes, 1.0 - self.offset)
    self.bias = weight(axes, 0.0) if self.kind in ('layer', 'layer1') else None

  @property
  def offset(self) -> float:
    """The number to add to the stored scale."""
    return 1.0 if self.kind in ('rms1', 'layer1') else 0.0

  def __call__(self, x_BTD):
    """Normalises the last axis of x, in float32. x may have any leading axes."""
    if self.kind == 'rms':
      return rms_norm(x_BTD, whole(self.scale), self.eps)
    x32_BTD = x_BTD.astype(jnp.float32)
    if self.kind != 'rms1':
      x32_BTD = x32_BTD - jnp.mean(x32_BTD, -1, keepdims=True)
    x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + self.eps)
    scale_D = whole(self.scale).astype(jnp.float32)
    y_BTD = x32_BTD * wide(self.offset + scale_D if self.offset else scale_D, x_BTD)
    if self.bias is not None:
      y_BTD = y_BTD + wide(whole(self.bias).astype(jnp.float32), x_BTD)
    return y_BTD.astype(x_BTD.dtype)


class Block(nnx.Module):
  """One layer. With a leading axis L it holds the weights of all layers, to scan over."""

  def __init__(self, spec: Spec, weight: Weight):
    self.spec = spec

    def norm(axes='LD', kind=None):
      return Norm(spec, weight, axes, kind)

    def bias(there, axes):
      return weight(axes, 0.0) if there else None

    self.attn_norm = None if spec.block == 'branch' else norm()
    self.wq = weight('LDNH', 'D')
    self.wk = weight('LDKH', 'D')
    self.wv = weight('LDKH', 'D')
    self.w_attn_gate = weight('LDNH', 'D') if spec.attn_gate else None
    self.bq, self.bk, self.bv = (bias(spec.qkv_bias, axes) for axes in ('LNH', 'LKH', 'LKH'))
    axes = ('LNH', 'LKH') if spec.qk_norm_over == 'all' else ('LH', 'LH')
    self.q_norm, self.k_norm = (norm(a) if spec.qk_norm else None for a in axes)
    self.wo = weight('LNHD', 'NH')
    self.bo = bias(spec.out_bias, 'LD')
    self.sinks = bias(spec.sinks, 'LN')
    self.mlp_norm = None if spec.shared_norm or spec.block == 'branch' else norm()
    self.router = weight('LDE', 'D') if spec.experts else None
    self.router_bias = bias(spec.router_bias, 'LE')
    LE = 'LE' if spec.experts else 'L'
    self.w_gate = weight(LE + 'DF', 'D') if spec.gated_mlp else None
    self.b_gate = bias(spec.mlp_bias and spec.gated_mlp, LE + 'F')
    self.w_up = weight(LE + 'DF', 'D')
    self.b_up = bias(spec.mlp_bias, LE + 'F')
    self.w_down = weight(LE + 'FD', 'F')
    self.b_down = bias(spec.mlp_bias, LE + 'D')
    self.post_attn_norm, self.post_mlp_norm = (norm() if spec.norms_output else None for _ in 'am')

    def of_activation(value):
      return weight('LX', value) if spec.activation == 'xielu' else None

    self.act_pos, self.act_neg = of_activation(0.0), of_activation(0.0)
    self.act_beta, self.act_eps = of_activation(0.5), of_activation(-1e-6)
    self.patch = weight('LDD', 0.0) if spec.patched else None
    if spec.delta:
      self.w_delta, self.w_delta_gate = weight('LDC', 'D'), weight('LDZ', 'D')
      self.delta_beta, self.delta_decay = weight('LDM', 'D'), weight('LDM', 'D')
      self.delta_kernel = weight('LCW', 'W')
      self.delta_bias, self.delta_log = weight('LM', 1.0), weight('LM', 0.0)
      self.delta_norm = Norm(spec, weight, 'LU', 'rms')

  def qkv(self, x_BTD, rope):
    """Returns queries [B, T, N, H], keys and values [B, T, K, H]. Queries and keys are rotated by RoPE."""
    h_BTD = self.attn_norm(x_BTD) if self.spec.reads_normed else x_BTD

    def project(w, b, axes):
      return _plus(_product(f'BTD,D{axes}->BT{axes}', h_BTD, w), b)

    q_BTNH, k_BTKH = project(self.wq, self.bq, 'NH'), project(self.wk, self.bk, 'KH')
    if self.spec.qk_norm and not self.spec.qk_norm_last:
      q_BTNH, k_BTKH = self._normed(self.q_norm, q_BTNH), self._normed(self.k_norm, k_BTKH)
    q_BTNH, k_BTKH = (apply_rope(a, rope, self.spec.rope_pairs) for a in (q_BTNH, k_BTKH))
    if self.spec.qk_norm and self.spec.qk_norm_last:
      q_BTNH, k_BTKH = self._normed(self.q_norm, q_BTNH), self._normed(self.k_norm, k_BTKH)
    return q_BTNH, k_BTKH, project(self.wv, self.bv, 'KH')

  def _normed(self, norm: Norm, a_BTNH):
    """Normalises each head, or all heads together (Spec.qk_norm_over)."""
    if self.spec.qk_norm_over == 'head':
      return norm(a_BTNH)
    flat = a_BTNH.reshape(*a_BTNH.shape[:2], -1)
    return rms_norm(flat, whole(norm.scale).reshape(-1), norm.eps).reshape(a_BTNH.shape)

  def attn_update(self, attended_BTNH, x_BTD):
    """Returns attention's update of the residual stream. x_BTD: the input of the layer."""
    out_BTD = _plus(_product('BTNH,NHD->BTD', attended_BTNH, self.wo), self.bo)
    if self.spec.block == 'post':
      return self.attn_norm(x_BTD + out_BTD) - x_BTD
    return self._scaled(self.post_attn_norm(out_BTD) if self.spec.norms_output else out_BTD)

  def _scaled(self, update_BTD):
    scale = self.spec.residual_scale
    return update_BTD if scale == 1 else update_BTD * jnp.asarray(scale, update_BTD.dtype)

  def mixed(self, x_BTD, rope, window=None, mixer=0):
    """Returns the input of the output projection, [B, T, N, H], from attention or a delta-net.

    Args:
      mixer: As in Spec.mixer_L; it may be traced.
    """

    def by_attention(x_BTD):
      return self.gated(attention(*self.qkv(x_BTD, rope), window, *self.scores(), self.spec.window_L), x_BTD)

    def by_delta(x_BTD):
      return self.of_delta(x_BTD)[0]

    if not isinstance(mixer, int):
      return jax.lax.cond(mixer, by_delta, by_attention, x_BTD)
    return by_delta(x_BTD) if mixer else by_attention(x_BTD)

  def gated(self, attended_BTNH, x_BTD):
    """Returns the output of attention times its gate, if the layer has one. x_BTD: the input of the layer."""
    if self.w_attn_gate is None:
      return attended_BTNH
    return attended_BTNH * jax.nn.sigmoid(_product('BTD,DNH->BTNH', self.attn_norm(x_BTD), self.w_attn_gate))

  def of_delta(self, x_BTD, before: delta.State | None = None, length_B=None):
    """Returns (the delta-net's input of the output projection [B, T, N, H], its State after x_BTD).

    Args:
      before: The State before x_BTD, which is then one token; None: x_BTD is a whole text.
      length_B: See delta.of_text.
    """
    h_BTD, sizes = self.attn_norm(x_BTD), self.spec.delta
    assert sizes is not None

    def small(w):
      return products.einsum('BTD,DM->BTM', h_BTD, _cast(w, h_BTD)).astype(jnp.float32)

    rate_M, bias_M = (whole(p, jnp.float32) for p in (self.delta_log, self.delta_bias))
    inputs = {
      'channels_BTC': _product('BTD,DC->BTC', h_BTD, self.w_delta),
      'beta_BTM': jax.nn.sigmoid(small(self.delta_beta)),
      'decay_BTM': wide(-jnp.exp(rate_M), h_BTD) * jax.nn.softplus(small(self.delta_decay) + wide(bias_M, h_BTD)),
      'kernel_CW': _cast(self.delta_kernel, h_BTD),
    }
    act = ACTIVATIONS[self.spec.activation]
    if before is None:
      out_BTMU, after = delta.of_text(sizes, inputs, act, length_B)
    else:
      out_BTMU, after = delta.of_token(sizes, inputs, act, before)
    gate_BTZ = _product('BTD,DZ->BTZ', h_BTD, self.w_delta_gate).astype(jnp.float32)
    normed_BTMU = self.delta_norm(out_BTMU.astype(h_BTD.dtype))
    gated_BTMU = normed_BTMU * jax.nn.silu(gate_BTZ).reshape(normed_BTMU.shape)
    return gated_BTMU.astype(h_BTD.dtype).reshape(*h_BTD.shape[:2], self.spec.num_heads, -1), after

  def scores(self):
    """Returns the arguments scale, cap and sink_N of `attention`."""
    return *self.spec.scores(), None if self.sinks is None else whole(self.sinks)

  def mlp_features(self, x_BTD, attn_BTD):
    """Returns the input of the down projection, [B, T, F]; for experts their summed output, [B, T, D].

    Args:
      x_BTD: The input of the layer.
      attn_BTD: Attention's update.
    """
    h_BTD = x_BTD if self.spec.block == 'parallel' else x_BTD + attn_BTD
    if self.spec.reads_normed:
      h_BTD = (self.attn_norm if self.spec.shared_norm else self.mlp_norm)(h_BTD)
    if self.spec.experts:
      return self._mixture(h_BTD)

    def project(w, b):
      return _plus(_product('BTD,DF->BTF', h_BTD, w), b)

    gate_BTF = project(self.w_gate, self.b_gate) if self.spec.gated_mlp else None
    return self._activated(gate_BTF, project(self.w_up, self.b_up))

  def _mixture(self, h_BTD):
    score_BTE = products.einsum('BTD,DE->BTE', h_BTD, _cast(self.router, h_BTD), jnp.float32)
    score_BTE = _plus(score_BTE, self.router_bias)
    names = ('w_gate', 'w_up', 'w_down', 'b_gate', 'b_up', 'b_down')
    weights = {name: None if (w := getattr(self, name)) is None else _cast(w, h_BTD) for name in names}
    return experts.mixture(self.spec, h_BTD, *experts.chosen(self.spec, score_BTE), weights, self._activated)

  def _activated(self, gate, up):
    """Returns the input of the down projection. gate: output of the gate projection, None if there is none."""
    spec = self.spec
    act = self._xielu if spec.activation == 'xielu' else ACTIVATIONS[spec.activation]
    if gate is None:
      return act(up)
    if spec.glu_limit is None:
      return act(gate) * up
    gate, up = jnp.minimum(gate, spec.glu_limit), jnp.clip(up, -spec.glu_limit, spec.glu_limit)
    return gate * jax.nn.sigmoid(spec.glu_alpha * gate) * (up + 1)

  def _xielu(self, x_BTF):
    """xIELU (arXiv 2411.13010) with two trained parameters per layer. Its two constants are stored as well."""
    pos, neg = (jax.nn.softplus(whole(p, x_BTF.dtype)[0]) for p in (self.act_pos, self.act_neg))
    beta, eps = (jax.lax.stop_gradient(whole(p, x_BTF.dtype)[0]) for p in (self.act_beta, self.act_eps))
    below = (jnp.expm1(jnp.minimum(x_BTF, eps)) - x_BTF) * (beta + neg) + beta * x_BTF
    return jnp.where(x_BTF > 0, pos * x_BTF * x_BTF + beta * x_BTF, below)

  def mlp_output(self, f_BTF):
    """Returns the output of the down projection, before the output norm of a sandwich block."""
    if self.spec.experts:
      return f_BTF
    return _plus(_product('BTF,FD->BTD', f_BTF, self.w_down), self.b_down)

  def mlp_update(self, f_BTF, mid_BTD):
    """Returns the MLP's update of mid_BTD, the residual stream after attention. Includes the patch, if there is one."""
    out_BTD = self.mlp_output(f_BTF)
    if self.spec.block == 'post':
      out_BTD = self.mlp_norm(mid_BTD + out_BTD) - mid_BTD
    else:
      out_BTD = self._scaled(self.post_mlp_norm(out_BTD) if self.spec.norms_output else out_BTD)
    if self.patch is None:
      return out_BTD

    def patched(y_BTD):
      return _product('BTD,DE->BTE', y_BTD, self.patch)

    # Skipped where the matrix is zero: it takes no time there, and training does not change it.
    there = jnp.any(self.patch[...] != 0)
    return out_BTD + jax.lax.cond(there, patched, jnp.zeros_like, mid_BTD + out_BTD)

  def updates(self, x_BTD, attended_BTNH):
    """Returns the updates of attention and MLP. attended_BTNH: the input of attention's output projection."""
    attn_BTD = self.attn_update(attended_BTNH, x_BTD)
    return attn_BTD, self.mlp_update(self.mlp_features(x_BTD, attn_BTD), x_BTD + attn_BTD)

  def __call__(self, x_BTD, gate, rope, mode: Mode, window=None, mixer=0):
    """Runs one gated layer. gate: fp32 scalar. Returns (output x_BTD, ungated update d_BTD)."""
    attn_BTD, mlp_BTD = self.updates(x_BTD, self.mixed(x_BTD, rope, window, mixer))
    # Summed in the order of the ungated network, so that a gate of 1 changes no bit and a gate of 0 returns x.
    if mode.gate == 'residual':
      y_BTD = (x_BTD + gate * attn_BTD) + gate * mlp_BTD
    else:
      y_BTD = gate * ((x_BTD + attn_BTD) + mlp_BTD)
    return y_BTD.astype(x_BTD.dtype), attn_BTD + mlp_BTD


def is_of_mixer(name: str, mixer: int) -> bool:
  """Whether only layers of this mixer (Spec.mixer_L) read a parameter of Block."""
  if mixer:
    return name.startswith(('w_delta', 'delta_'))
  return name in ('wq', 'wk', 'wv', 'w_attn_gate', 'bq', 'bk', 'bv', 'q_norm', 'k_norm', 'sinks')


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': jax.nn.gelu,
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}


def _plus(x, bias: nnx.Param | None):
  """Returns x + bias. The bias has the last axes of x."""
  return x if bias is None else x + wide(whole(bias, x.dtype), x)


def wide(a, like):
  return a.reshape((1,) * (like.ndim - a.ndim) + a.shape)


def _cast(weight: nnx.Param, like):
  return whole(weight, like.dtype)


def whole(param: nnx.Param, dtype=None):
  """Returns a parameter's value, cast to `dtype` first and then gathered from the devices that share it."""
  value = param[...]
  return sharding.gather(value if dtype is None else value.astype(dtype), param.get_metadata()['axes'])


def _product(equation: str, x, weight: nnx.Param | lora.Lora):
  """jnp.einsum of x and a layer's matrix, in the dtype of x."""
  if isinstance(weight, lora.Lora):
    return lora.product(equation, weight.scale, x, _cast(weight.base, x), whole(weight.a), whole(weight.b))
  return products.einsum(equation, x, _cast(weight, x))


def rms_norm(x_BTD, scale_D, eps: float):
  """RMSNorm, computed in float32."""
  x32_BTD = x_BTD.astype(jnp.float32)
  x32_BTD = x32_BTD * jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, -1, keepdims=True) + eps)
  return x32_BTD.astype(x_BTD.dtype) * wide(scale_D.astype(x_BTD.dtype), x_BTD)
