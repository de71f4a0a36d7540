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

CPU_QUERY_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Spec:
  """What the family's config says of the computation, the number of layers apart (that is the weights' own)."""

  vocab_size: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float
  tied: bool  # the output head is the embedding
  rope_freq_H: tuple[float, ...]  # radians per position; half a head's width of them

  def sizes(self, num_layers: int) -> dict[str, int]:
    return {
        'L': num_layers, 'V': self.vocab_size, 'D': self.d_model, 'N': self.num_heads, 'K': self.num_kv_heads,
        'H': self.head_dim, 'F': self.d_ff,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mode:
  """How `forward` computes; static under jit."""

  gate: str = 'residual'  # residual: x + g·d; output: g·(x + d)
  penalty: str = 'l2'  # the norm of d: l2 or l1
  penalty_scale: str = 'token'  # token, relative or none: see delta_norm
  dtype: str = 'float32'  # of activations and of the weights where they are used
  remat: str = 'none'  # what the backward pass computes again: none, dots or full


# weight(axes, fan_in) -> parameter. `fan_in` names the axes that are summed over; None: a norm's scale, ones.
Weight = Callable[[str, str | None], nnx.Param]


def _weight_maker(spec: Spec, num_layers: int, key: jax.Array) -> Weight:
  sizes, keys = spec.sizes(num_layers), iter(jax.random.split(key, 16))

  def weight(axes: str, fan_in: str | None) -> nnx.Param:
    shape = tuple(sizes[a] for a in axes)
    if fan_in is None:
      return nnx.Param(jnp.ones(shape), axes=axes)
    scale = np.prod([sizes[a] for a in fan_in]) ** -0.5
    return nnx.Param(scale * jax.random.normal(next(keys), shape), axes=axes)

  return weight


class Block(nnx.Module):
  """One layer's weights; with the leading L kept, those of all layers, to be scanned over."""

  def __init__(self, spec: Spec, weight: Weight):
    self.spec = spec
    self.attn_norm = weight('LD', None)
    self.wq = weight('LDNH', 'D')
    self.wk = weight('LDKH', 'D')
    self.wv = weight('LDKH', 'D')
    self.wo = weight('LNHD', 'NH')
    self.mlp_norm = weight('LD', None)
    self.w_gate = weight('LDF', 'D')
    self.w_up = weight('LDF', 'D')
    self.w_down = weight('LFD', 'F')

  def qkv(self, x_BTD, rope):
    """Queries [B, T, N, H], keys and values [B, T, K, H] of this layer, the first two rotated."""
    h_BTD = rms_norm(x_BTD, self.attn_norm[...], self.spec.norm_eps)
    q_BTNH = apply_rope(jnp.einsum('BTD,DNH->BTNH', h_BTD, _cast(self.wq, h_BTD)), rope)
    k_BTKH = apply_rope(jnp.einsum('BTD,DKH->BTKH', h_BTD, _cast(self.wk, h_BTD)), rope)
    return q_BTNH, k_BTKH, jnp.einsum('BTD,DKH->BTKH', h_BTD, _cast(self.wv, h_BTD))

  def attn_update(self, attended_BTNH):
    return jnp.einsum('BTNH,NHD->BTD', attended_BTNH, _cast(self.wo, attended_BTNH))

  def mlp_features(self, x_BTD):
    """What the down projection reads, [B, T, F], where x_BTD is the stream after attention."""
    h_BTD = rms_norm(x_BTD, self.mlp_norm[...], self.spec.norm_eps)
    gate_BTF = jnp.einsum('BTD,DF->BTF', h_BTD, _cast(self.w_gate, h_BTD))
    return jax.nn.silu(gate_BTF) * jnp.einsum('BTD,DF->BTF', h_BTD, _cast(self.w_up, h_BTD))

  def mlp_update(self, f_BTF):
    return jnp.einsum('BTF,FD->BTD', f_BTF, _cast(self.w_down, f_BTF))

  def __call__(self, x_BTD, gate, rope, mode: Mode):
    """One gated layer: (x_BTD, gate as an fp32 scalar) -> (next x_BTD, the layer's own update d_BTD, ungated)."""
    attn_BTD = self.attn_update(attention(*self.qkv(x_BTD, rope)))
    mlp_BTD = self.mlp_update(self.mlp_features(x_BTD + attn_BTD))
    # Added in the order of the ungated network, so that a gate of 1 changes no bit and a gate of 0 leaves x alone.
    if mode.gate == 'residual':
      y_BTD = (x_BTD + gate * attn_BTD) + gate * mlp_BTD
    else:
      y_BTD = gate * ((x_BTD + attn_BTD) + mlp_BTD)
    return y_BTD.astype(x_BTD.dtype), attn_BTD + mlp_BTD


def _cast(weight: nnx.Param, like):
  return weight[...].astype(like.dtype)


class Decoder(nnx.Module):
  """A Llama-type decoder. `gate_L` (fp32) holds one gate per layer; at 1 the network is the ungated one."""

  def __init__(self, spec: Spec, num_layers: int, key: jax.Array):
    weight = _weight_maker(spec, num_layers, key)
    self.spec = spec
    self.embed = weight('VD', 'D')
    self.layers = Block(spec, weight)
    self.gate_L = nnx.Param(jnp.ones(num_layers, jnp.float32), axes='L')
    self.final_norm = weight('D', None)
    self.head = None if spec.tied else weight('VD', 'D')

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


def embed(model: Decoder, tokens_BT, mode: Mode = Mode()):
  """The stream x_BTD that the first layer reads."""
  return jnp.take(model.embed[...], tokens_BT, axis=0).astype(mode.dtype)


def final(model: Decoder, x_BTD):
  """The final norm."""
  return rms_norm(x_BTD, model.final_norm[...], model.spec.norm_eps)


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
  rope = rope_tables(model.spec, x_BTD.shape[1])

  def layer(x_BTD, scanned):
    block, gate, alive = scanned

    def run(x_BTD):
      y_BTD, d_BTD = block(x_BTD, gate, rope, mode)
      return y_BTD, delta_norm(d_BTD, x_BTD, mode.penalty, mode.penalty_scale)

    y_BTD, delta = jax.lax.cond(alive, run, lambda x_BTD: (x_BTD, jnp.float32(0)), x_BTD)
    return y_BTD, (delta, x_BTD) if inputs else delta

  if mode.remat == 'full':
    layer = jax.checkpoint(layer)
  elif mode.remat == 'dots':
    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.checkpoint_dots)
  x_BTD, out = jax.lax.scan(layer, x_BTD, (model.layers, gate_L, alive_L))
  return (x_BTD, *out) if inputs else (x_BTD, out)


def logits(model: Decoder, x_BTD):
  """float32 logits_BTV of `forward`'s hidden states. For a loss use losses.next_token_nll, which never holds them all."""
  head_VD = (model.embed if model.head is None else model.head)[...]
  return jnp.einsum('BTD,VD->BTV', x_BTD, head_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)


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
  return x32_BTD.astype(x_BTD.dtype) * scale_D[None, None].astype(x_BTD.dtype)


def rope_tables(spec: Spec, num_tokens: int):
  """(cos_TH, sin_TH) of the positions 0 … num_tokens − 1 in float32, each half as wide as a head."""
  angle_TH = jnp.arange(num_tokens, dtype=jnp.float32)[:, None] * jnp.array(spec.rope_freq_H, jnp.float32)[None]
  return jnp.cos(angle_TH), jnp.sin(angle_TH)


def apply_rope(x_BTNH, rope):
  """Rotates the pairs (i, i + H/2) of each head, Hugging Face's layout, in float32."""
  cos, sin = (table_TH[None, :, None, :] for table_TH in rope)
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)


def attention(q_BTNH, k_BTKH, v_BTKH):
  """Causal attention [B, T, N, H]; query head n reads key/value head n // (N/K). cuDNN's fused kernel on a GPU."""
  backend, T = jax.default_backend(), q_BTNH.shape[1]
  if backend != 'cpu':
    fused = backend == 'gpu' and q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and q_BTNH.shape[-1] <= 128
    implementation = 'cudnn' if fused else 'xla'
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation=implementation)
  # A CPU has no fused kernel: blocks of queries that do not read the keys after them take half the time of the square.
  blocks = []
  for start in range(0, T, CPU_QUERY_BLOCK):
    end = min(T, start + CPU_QUERY_BLOCK)
    causal_ts = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    blocks.append(
      jax.nn.dot_product_attention(q_BTNH[:, start:end], k_BTKH[:, :end], v_BTKH[:, :end], mask=causal_ts[None, None])
    )
  return jnp.concatenate(blocks, axis=1)
