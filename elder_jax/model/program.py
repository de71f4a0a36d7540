"""What the plan knows of a computation before anything is loaded: abstract arrays, bytes on each device, FLOPs."""

import dataclasses
import math
from typing import Any

import jax

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec


@dataclasses.dataclass(frozen=True)
class Program:
  """The heaviest jitted call of a stage and its arguments; arrays are abstract and have their shardings."""

  name: str
  call: Any  # jitted; None: nothing is computed that takes more than what is there
  args: tuple
  model_flops: float  # of one call on all devices, by formula: no recomputation
  # Bytes on each device.
  params: int
  opt_state: int = 0
  gradients: int = 0
  beside: int = 0  # models that are not arguments but there
  twice: int = 0  # of the arguments, what is given under two names but there once
  host: bool = False  # not on the devices but in the memory of the first host
  calls: int = 1  # in one run

  @property
  def state(self) -> int:
    """Bytes on each device without activations."""
    return self.params + self.opt_state + self.gradients + self.beside


@dataclasses.dataclass(frozen=True)
class Shapes:
  """What the programs of a run follow from. The mesh must be set (jax.set_mesh), or one device is assumed."""

  dense: Decoder  # abstract
  tokens_BT: jax.ShapeDtypeStruct  # a batch of the training text
  mode: Mode
  mesh: jax.sharding.Mesh
  settings: Any  # run.config.Config
  export_dtype: str
  num_removes: tuple[int, ...] = ()  # the first is that of the exported model
  teacher: Decoder | None = None  # abstract; of --teacher, where that is not the dense model

  @property
  def spec(self) -> Spec:
    return self.dense.spec

  @property
  def num_layers(self) -> int:
    return self.dense.num_layers

  def batch(self, B: int, T: int, dtype: str = 'int32') -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((B, T), dtype, sharding=self.tokens_BT.sharding)

  def flops(self, num_layers: int | None = None, tokens: int | None = None, seq_len: int | None = None) -> float:
    """Of a forward pass; unset: all layers, a batch of the training text."""
    B, T = self.tokens_BT.shape
    layers = self.num_layers if num_layers is None else num_layers
    return (tokens or B * T) * sum(forward_flops(self.spec.with_layers([]), layers, seq_len or T))


def device_bytes(tree) -> int:
  """Bytes of a tree's arrays, abstract or not, on each device."""

  def size(a):
    return math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize

  return sum(size(a) for a in jax.tree.leaves(tree) if hasattr(a, 'sharding'))


def forward_flops(spec: Spec, num_layers: int, seq_len: int) -> tuple[float, float, float]:
  """FLOPs per token of a forward pass: (in the layers' matrices, in attention's scores and sums, in the head).

  Two per weight and product; attention as the full square, the convention of model FLOPs utilisation (Chowdhery et al.,
  arXiv 2204.02311, appendix B).
  """
  sizes = spec.sizes(num_layers)
  D, N, K, H, F = (sizes[a] for a in 'DNKHF')
  mlps = spec.experts_per_token if spec.experts else 1
  weights = 2 * D * N * H + 2 * D * K * H + mlps * (3 if spec.gated_mlp else 2) * D * F + D * sizes['E']
  return 2.0 * num_layers * weights, 4.0 * num_layers * seq_len * N * H, 2.0 * sizes['V'] * D


def training_flops(spec: Spec, num_layers: int, seq_len: int, trained: str) -> float:
  """FLOPs per token of a step: forward, to the activations, and to the weights that are trained (as train.mask)."""
  layers, attention, head = forward_flops(spec, num_layers, seq_len)
  to_weights = {'blocks': layers, 'all': layers + head}.get(trained, 0)  # of gates, LoRA and single parameters: little
  return 2 * (layers + head) + 3 * attention + to_weights
