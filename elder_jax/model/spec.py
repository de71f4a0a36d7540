"""What a model is (Spec) and how it is computed (Mode)."""

import dataclasses
from typing import NamedTuple


class Delta(NamedTuple):
  """Sizes of delta-net layers (model/delta.py)."""

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
  rope_scale_R: tuple[float, ...] = ()  # of each table's cosine and sine; empty: 1
  # The tables for a text of more than `rope_near` tokens; empty: the same for all.
  rope_far_RH: tuple[tuple[float, ...], ...] = ()
  rope_near: int = 0
  rope_pairs: bool = False  # pairs are neighbours (2i, 2i + 1); else (i, i + R/2)
  rope_until: int = 0  # positions that the tables hold for; 0: any number
  # Per layer, sliced with the layers. Empty: 0 everywhere.
  rope_L: tuple[int, ...] = ()  # which table
  window_L: tuple[int, ...] = ()  # how many of the last tokens, its own included, a token sees; 0: all
  mixer_L: tuple[int, ...] = ()  # 1: a delta-net in place of attention
  delta: Delta | None = None
  # rms; layer: LayerNorm; rms1, layer1: the same scaled by 1 + w; layer0: LayerNorm without a bias
  norm: str = 'rms'
  # pre:      h = x + attn(norm(x)), y = h + mlp(norm(h))        parallel: y = x + attn(norm(x)) + mlp(norm(x))
  # sandwich: pre, with a norm on what each of both adds         branch:   h = x + norm(attn(x)), y = h + norm(mlp(h))
  # post:     h = norm(x + attn(x)), y = norm(h + mlp(h))
  block: str = 'pre'
  shared_norm: bool = False  # parallel: both read the same norm
  final_norm: bool = True
  qk_norm: bool = False  # an RMSNorm over each head's query and key
  qk_norm_over: str = 'head'  # head; all: over the queries of all heads together, and the keys
  qk_norm_last: bool = False  # after the rotation
  attn_gate: bool = False  # what attention gives is multiplied by a sigmoid of a projection
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
  residual_scale: float = 1.0  # of what attention and the MLP add
  logit_scale: float = 1.0
  sinks: bool = False  # a score of each head that takes its part of the softmax and gives nothing
  experts: int = 0  # MLPs of which each token takes `experts_per_token`; 0: one for all
  experts_per_token: int = 0
  router: str = 'chosen'  # the scores' softmax is over: chosen, the token's own experts; all of them
  router_bias: bool = False
  # g · sigmoid(glu_alpha · g) · (u + 1) in place of activation(gate) · up: g = min(gate, limit), u = up within ±limit.
  glu_limit: float | None = None
  glu_alpha: float = 1.0
  patched: bool = False  # what a layer writes is y + y·M, M a D × D matrix; no family has it (recipes/patch.py)

  @property
  def reads_normed(self) -> bool:
    """Attention and the MLP read a norm of the stream."""
    return self.block not in ('post', 'branch')

  @property
  def norms_output(self) -> bool:
    """A norm is on what attention and the MLP add."""
    return self.block in ('sandwich', 'branch')

  @property
  def most_positions(self) -> int:
    """Tokens that a text may have; 0: any number."""
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
    """`attention`'s scale and cap; Block.scores has the sinks, too."""
    return self.attn_scale, self.attn_softcap

  def outputs(self) -> tuple[float, float | None]:
    """Scale and cap of the logits."""
    return self.logit_scale, self.final_softcap

  def with_layers(self, kept: list[int]) -> 'Spec':
    """The spec of the model that has only the layers `kept`."""

    def cut(of_L):
      return tuple(of_L[l] for l in kept) if of_L else ()

    return dataclasses.replace(self, rope_L=cut(self.rope_L), window_L=cut(self.window_L), mixer_L=cut(self.mixer_L))


@dataclasses.dataclass(frozen=True)
class Mode:
  """How `forward` computes; static under jit."""

  gate: str = 'residual'  # residual: x + g·d; output: g·(x + d)
  # Of an update's size in the loss: training/penalty.py.
  penalty: str = 'l2'
  penalty_scale: str = 'token'
  dtype: str = 'float32'  # of activations and of the weights where they are used
  remat: str = 'none'  # what the backward pass computes again: none, dots, dots_no_batch or full
