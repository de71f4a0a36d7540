"""What the compiler reports about a program: bytes per device and FLOPs, from which the least time of a call follows."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.extend import core
from jax.sharding import Mesh

from elder_jax.devices import memory
from elder_jax.model.program import Program
from elder_jax.model.program import device_bytes

GIB = 2**30
# Device kind -> (bfloat16 FLOP/s, bytes of memory). FLOP/s of TPUs: cloud.google.com/tpu/docs/system-architecture-tpu-vm;
# their memory is what the compiler leaves to a program, of 32, 16, 95 and 32 GiB. FLOP/s of GPUs: NVIDIA's data sheets,
# without sparsity; their memory is reported by the device.
DEVICES = {
  'TPU v4': (275e12, 30.75 * GIB),
  'TPU v5 lite': (197e12, 15.75 * GIB),
  'TPU v5': (459e12, 95.74 * GIB),
  'TPU v5p': (459e12, 95.74 * GIB),
  'TPU v6 lite': (918e12, 31.25 * GIB),
  'NVIDIA A100-SXM4-40GB': (312e12, None),
  'NVIDIA A100-SXM4-80GB': (312e12, None),
  'NVIDIA H100 80GB HBM3': (989e12, None),
  'NVIDIA H200': (989e12, None),
}


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a program needs on each device."""

  program: Program
  limit: float  # bytes that a device has
  peak: int  # bytes; if not compiled, only the part that is known without the compiler
  compiled: Any  # jax.stages.Compiled; None: not compiled, or it did not fit
  flops: float | None  # of one call on all devices, including recomputation; None: not compiled
  least_seconds: float | None  # of one call, from model FLOPs at the devices' peak; None: peak unknown

  @property
  def fits(self) -> bool:
    return self.peak <= self.limit


def measure(program: Program, mesh: Mesh, compile_it: bool = True) -> Needs:
  """Returns what a program needs. The mesh must be set (jax.set_mesh)."""
  device = mesh.devices.flat[0]
  peak_flops, limit = DEVICES.get(device.device_kind, (None, None))
  least = program.model_flops / mesh.size / peak_flops if peak_flops else None
  limit = memory.total() if program.host else limit or _memory(device)
  needs = Needs(program, limit, program.state, None, None, least)
  if not compile_it or program.call is None:
    return needs
  traced = program.call.trace(*program.args)
  needs = dataclasses.replace(needs, flops=traced_flops(traced.jaxpr.jaxpr))
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    # The compiler refuses a program that does not fit, and reports its size.
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    used = re.search(r'(Used|temporaries) \(?([\d.]+)([KMGT])', str(e))
    peak = float(used[2]) * 1024 ** ('KMGT'.index(used[3]) + 1) if used else 0
    peak += (0 if used and used[1] == 'Used' else device_bytes(program.args)) - program.twice
    return dataclasses.replace(needs, peak=max(peak, needs.limit + 1) + program.beside)
  m = compiled.memory_analysis()
  taken = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes
  return dataclasses.replace(needs, peak=taken + program.beside - program.twice, compiled=compiled)


def _memory(device) -> int:
  if device.platform == 'cpu':  # simulated devices share the host's memory
    return memory.total() // jax.local_device_count()
  return device.memory_stats()['bytes_limit']


def traced_flops(jaxpr) -> float:
  """FLOPs of the matrix products in a jaxpr on all devices: loops times their length, the longest branch of each cond.

  A kernel counts as if it skipped no block.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    inner = [traced_flops(j) for j in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    elif eqn.primitive.name == 'cond':
      total += max(inner)
    elif eqn.primitive.name == 'pallas_call':
      total += sum(inner) * math.prod(eqn.params['grid_mapping'].grid)
    else:
      total += sum(inner) * eqn.params.get('length', 1)
  return total
