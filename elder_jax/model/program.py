"""What the plan needs about a computation before anything is loaded: abstract arrays, bytes per device, FLOPs."""

import dataclasses
import math
from typing import Any

import jax

from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec


@dataclasses.dataclass(frozen=True)
class Program:
  """The heaviest jitted call of a stage, and its arguments: abstract arrays with their shardings."""

  name: str
  call: Any  # jitted function; None: nothing to compile, the bytes below are all
  args: tuple
  model_flops: float  # of one call on all devices, by formula, without recomputation
  # Bytes per device:
  params: int
  opt_state: int = 0
  gradients: int = 0
  beside: int = 0  # models in memory that are not arguments
  twice: int = 0  # arguments that are passed twice but are in memory once
  host: bool = False  # the bytes are in the memory of the first host, not on devices
  calls: int = 1  # number of calls in one run

  @property
  def state(self) -> int:
    """Bytes per device, without activations."""
    return self.params + self.opt_state + self.gradients + self.beside


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Everything that determines the programs of a run. Without a mesh (jax.set_mesh) one device is assumed."""

  dense: Decoder  # abstract
  tokens_BT: jax.ShapeDtypeStruct  # one batch of the training text
  mode: Mode
  mesh: jax.sharding.Mesh
  settings: Any  # run.config.Config
  export_dtype: str
  num_removes: tuple[int, ...] = ()  # numbers of layers to remove; the first is that of the exported model
  teacher: Decoder | None = None  # abstract; the model of --teacher, if it is not the dense model

  @property
  def spec(self) -> Spec:
    return self.dense.spec

  @property
  def num_layers(self) -> int:
    return self.dense.num_layers

  def batch(self, B: int, T: int, dtype: str = 'int32') -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((B, T), dtype, sharding=self.tokens_BT.sharding)

  def flops(self, num_layers: int | None = None, tokens: int | None = None, seq_len: int | None = None) -> float:
    """Returns the FLOPs of a forward pass; by default of all layers and one batch of the training text."""
    B, T = self.tokens_BT.shape
    layers = self.num_layers if num_layers is None else num_layers
    return (tokens or B * T) * sum(forward_flops(self.spec.with_layers([]), layers, seq_len or T))

  @property
  def layers_flops(self) -> float:
    """FLOPs of a forward pass through all layers without the output head, for one batch of the training text."""
    *of_layers, _ = forward_flops(self.spec.with_layers([]), self.num_layers, self.tokens_BT.shape[1])
    return self.tokens_BT.size * sum(of_layers)


def device_bytes(tree) -> int:
  """Returns the bytes per device of a tree's arrays, abstract or not."""

  def size(a):
    return math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize

  return sum(size(a) for a in jax.tree.leaves(tree) if hasattr(a, 'sharding'))


def forward_flops(spec: Spec, num_layers: int, seq_len: int) -> tuple[float, float, float]:
  """Returns FLOPs per token of a forward pass: (layers' matrices, attention's scores and weighted sums, output head).

  Counts two FLOPs per weight, and attention as if it were not causal. This is the convention of model FLOPs utilisation
  (Chowdhery et al., arXiv 2204.02311, appendix B).
  """
  sizes = spec.sizes(num_layers)
  D, N, K, H, F = (sizes[a] for a in 'DNKHF')
  mlps = spec.experts_per_token if spec.experts else 1
  weights = 2 * D * N * H + 2 * D * K * H + mlps * (3 if spec.gated_mlp else 2) * D * F + D * sizes['E']
  return 2.0 * num_layers * weights, 4.0 * num_layers * seq_len * N * H, 2.0 * sizes['V'] * D


def training_flops(spec: Spec, num_layers: int, seq_len: int, trained: str) -> float:
  """Returns FLOPs per token of a training step: forward pass, gradients of activations and of the trained weights.

  Args:
    trained: What is trained, as in step.train_mask.
  """
  layers, attention, head = forward_flops(spec, num_layers, seq_len)
  to_weights = {'blocks': layers, 'all': layers + head}.get(trained, 0)  # negligible for gates, LoRA, single parameters
  return 2 * (layers + head) + 3 * attention + to_weights
