"""Bytes on each device and FLOPs, from shapes alone."""

import math

from flax import nnx
import jax
from jax.extend import core
from jax.sharding import Mesh

from elder_jax.devices import sharding
from elder_jax.hf import checkpoint_hf
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Spec


def device_bytes(tree) -> int:
  """Bytes of a tree's arrays, abstract or not, on each device."""
  size = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
  return sum(size(a) for a in jax.tree.leaves(tree) if hasattr(a, 'sharding'))


def abstract_model(spec: Spec, num_layers: int, dtype: str, mesh: Mesh, flag: str) -> Decoder:
  """The Decoder as checkpoint_hf.load gives it, without its arrays."""
  model = checkpoint_hf.abstract(spec, num_layers)
  places = sharding.for_model(model, mesh, flag)
  kind = lambda p: 'float32' if p.get_metadata()['axes'] == 'L' else dtype  # gates
  shape = lambda p, place: p.replace(jax.ShapeDtypeStruct(p.get_value().shape, kind(p), sharding=place.get_value()))
  return jax.tree.map(shape, model, places, is_leaf=lambda a: isinstance(a, nnx.Variable))


def placed(tree, mesh: Mesh):
  """Abstract arrays of a training state with the shardings that it has."""
  put = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
  return jax.tree.map(put, tree, sharding.for_state(tree, mesh))


def forward_flops(spec: Spec, num_layers: int, seq_len: int) -> tuple[float, float, float]:
  """FLOPs per token of a forward pass: (in the layers' matrices, in attention's scores and sums, in the head).

  Two per weight and product; attention as the full square, the convention of model FLOPs utilisation (Chowdhery et al.,
  arXiv 2204.02311, appendix B).
  """
  sizes = spec.sizes(num_layers)
  D, N, K, H, F = (sizes[a] for a in 'DNKHF')
  weights = 2 * D * N * H + 2 * D * K * H + (3 if spec.gated_mlp else 2) * D * F
  return 2.0 * num_layers * weights, 4.0 * num_layers * seq_len * N * H, 2.0 * sizes['V'] * D


def training_flops(spec: Spec, num_layers: int, seq_len: int, trained: str) -> float:
  """FLOPs per token of a step: forward, to the activations, and to the weights that are trained (as train.mask)."""
  layers, attention, head = forward_flops(spec, num_layers, seq_len)
  to_weights = {'gates': 0, 'lora': 0, 'blocks': layers, 'all': layers + head}[trained]
  return 2 * (layers + head) + 3 * attention + to_weights


def traced_flops(jaxpr) -> float:
  """FLOPs of the matrix products in a jaxpr, all devices together; loops as often as they run, of branches the longest."""
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [traced_flops(j) for j in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * eqn.params.get('length', 1)
  return total
