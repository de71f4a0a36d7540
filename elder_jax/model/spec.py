"""Spec, the architecture of a model, and Mode, how it is computed."""

import dataclasses
from typing import NamedTuple


class Delta(NamedTuple):
  """Sizes of the delta-net layers (model/delta.py)."""

  key_heads: int
  value_heads: int
  key_dim: int
  value_dim: int
  width: int  # of the convolution

  @property
  def channels(self) -> int:
    return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class Spec:
  """The architecture, from the family's config, without the number of layers (that is an axis of the weights).

  Fields after `rope_freq_RH` are the features in which families differ. Their defaults are those of Llama.
  """

  vocab_size: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  norm_eps: float
  tied: bool  # the output head is the embedding
  # RoPE: radians per position for each rotated pair of a head's dimensions. Dimensions after these are not rotated. One
  # table per kind of layer; a table of zeros: a layer without positions; tables of length 0: a model without RoPE.
  rope_freq_RH: tuple[tuple[float, ...], ...]
  rope_scale_R: tuple[float, ...] = ()  # factor of each table's cosines and sines; empty: 1
  # Tables for texts of more than `rope_near` tokens; empty: the same for all lengths.
  rope_far_RH: tuple[tuple[float, ...], ...] = ()
  rope_near: int = 0
  rope_pairs: bool = False  # rotated pairs are (2i, 2i + 1) instead of (i, i + R/2)
  rope_until: int = 0  # number of positions for which the tables are valid; 0: any number
  # Per layer, sliced with the layers. Empty: 0 for all layers.
  rope_L: tuple[int, ...] = ()  # index of the layer's table
  window_L: tuple[int, ...] = ()  # number of last tokens, its own included, that a token attends to; 0: all
  mixer_L: tuple[int, ...] = ()  # 0: attention; 1: delta-net
  delta: Delta | None = None
  # rms: RMSNorm; layer: LayerNorm; rms1, layer1: the same with scale 1 + w; layer0: LayerNorm without a bias
  norm: str = 'rms'
  # pre:      h = x + attn(norm(x)), y = h + mlp(norm(h))        parallel: y = x + attn(norm(x)) + mlp(norm(x))
  # sandwich: pre, with a norm on each of both updates           branch:   h = x + norm(attn(x)), y = h + norm(mlp(h))
  # post:     h = norm(x + attn(x)), y = norm(h + mlp(h))
  block: str = 'pre'
  shared_norm: bool = False  # parallel: attention and MLP read the same norm
  final_norm: bool = True
  qk_norm: bool = False  # RMSNorm of queries and keys
  qk_norm_over: str = 'head'  # head: each head separately; all: all heads together
  qk_norm_last: bool = False  # the norm comes after the rotation
  attn_gate: bool = False  # the output of attention is multiplied by the sigmoid of a projection
  activation: str = 'silu'
  gated_mlp: bool = True  # activation(gate) · up; else activation(up)
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  head_bias: bool = False
  num_positions: int = 0  # learned position embeddings; 0: none
  position_offset: int = 0  # row of the first token's position embedding
  embed_scale: float = 1.0
  attn_scale: float | None = None  # factor of the attention scores; None: head_dim ** -0.5
  attn_softcap: float | None = None  # scores s become cap · tanh(s / cap)
  final_softcap: float | None = None  # the same for the logits
  residual_scale: float = 1.0  # factor of the updates of attention and MLP
  logit_scale: float = 1.0
  sinks: bool = False  # attention sinks: an additional score per head in the softmax, without a value
  experts: int = 0  # number of expert MLPs; 0: one MLP for all tokens
  experts_per_token: int = 0
  router: str = 'chosen'  # the softmax is over: chosen, the token's own experts; all, all experts
  router_bias: bool = False
  # If set, activation(gate) · up becomes g · sigmoid(glu_alpha · g) · (u + 1), with g = min(gate, glu_limit) and u = up
  # clipped to ± glu_limit.
  glu_limit: float | None = None
  glu_alpha: float = 1.0
  patched: bool = (
    False  # the output y of a layer becomes y + y·M, M a D × D matrix; no family has it (recipes/patch.py)
  )

  @property
  def reads_normed(self) -> bool:
    """Whether attention and MLP read a norm of the residual stream."""
    return self.block not in ('post', 'branch')

  @property
  def norms_output(self) -> bool:
    """Whether the updates of attention and MLP are normalised."""
    return self.block in ('sandwich', 'branch')

  @property
  def most_positions(self) -> int:
    """The maximum number of tokens of a text; 0: any number."""
    return self.num_positions or self.rope_until

  def sizes(self, num_layers: int) -> dict[str, int]:
    delta = self.delta or Delta(0, 0, 0, 0, 0)
    return {
      'C': delta.channels,
      'M': delta.value_heads,
      'U': delta.value_dim,
      'W': delta.width,
      'Z': delta.value_heads * delta.value_dim,
      'L': num_layers,
      'V': self.vocab_size,
      'D': self.d_model,
      'N': self.num_heads,
      'K': self.num_kv_heads,
      'H': self.head_dim,
      'F': self.d_ff,
      'E': self.experts,
      'P': self.num_positions + self.position_offset,
      'X': 1,
    }

  def scores(self) -> tuple[float | None, float | None]:
    """Returns scale and cap of the attention scores. Block.scores returns the sinks as well."""
    return self.attn_scale, self.attn_softcap

  def outputs(self) -> tuple[float, float | None]:
    """Returns scale and cap of the logits."""
    return self.logit_scale, self.final_softcap

  def with_layers(self, kept: list[int]) -> 'Spec':
    """Returns the spec of the model with only the layers `kept`."""

    def cut(of_L):
      return tuple(of_L[l] for l in kept) if of_L else ()

    return dataclasses.replace(self, rope_L=cut(self.rope_L), window_L=cut(self.window_L), mixer_L=cut(self.mixer_L))


@dataclasses.dataclass(frozen=True)
class Mode:
  """How `forward` computes. A static argument under jit."""

  gate: str = 'residual'  # residual: x + g·d; output: g·(x + d)
  # Norm of an update in the loss; see training/penalty.py.
  penalty: str = 'l2'
  penalty_scale: str = 'token'
  dtype: str = 'float32'  # of activations, and of weights where they are used
  remat: str = 'none'  # what the backward pass recomputes: none, dots, dots_no_batch or full
