"""Prints the plan as a table."""

from jax.sharding import Mesh

from elder_jax.devices import memory
from elder_jax.run.plan.compile import GIB
from elder_jax.run.plan.compile import Needs
from elder_jax.run.tables import text_table

_HEAD = 'stage|parameters|optimiser|gradients|other models|activations …|peak|TFLOP|done|least s'.split('|')


def gib(size: float) -> str:
  """Bytes in GiB, without the unit."""
  return f'{size / GIB:.3g}' if size < GIB else f'{size / GIB:.2f}'


def plan_table(needs: list[Needs], mesh: Mesh) -> str:
  """GiB per device, FLOPs and least time of a step."""
  sizes = ' × '.join(f'{n} {axis}' for axis, n in mesh.shape.items())
  kind, limit = mesh.devices.flat[0].device_kind, needs[0].limit if needs else 0
  lines = [
    f'{mesh.size} × {kind} with {gib(limit)} GiB each, {sizes}; GiB per device:',
    text_table([_HEAD, *map(_row, needs)]),
    'TFLOP: of the model in one step, on all devices together. done: including recomputation. least s: seconds that TFLOP '
    "takes at the devices' peak speed.",
  ]
  if any(n.program.host for n in needs):
    lines.append(f'PyTorch uses the memory of the host, {gib(memory.total())} GiB.')
  if any(n.flops is None and n.program.call for n in needs):
    lines.append(
      'To include activations, use --plan. It compiles every program; on a CPU that takes as long as a small run.'
    )
  return '\n'.join(lines)


def _row(needs: Needs) -> list[str]:
  p = needs.program
  exact = needs.compiled or p.call is None or not needs.fits
  rest = gib(max(0, needs.peak - p.state)) if exact else '?'
  peak = gib(needs.peak) if exact else f'> {gib(needs.peak)}'
  sizes = [gib(n) for n in (p.params, p.opt_state, p.gradients, p.beside)]
  done = None if needs.flops is None else needs.flops / 1e12
  figures = (p.model_flops / 1e12, done, needs.least_seconds) if p.model_flops else ()
  work = ['?' if n is None else f'{n:.3g}' for n in figures] or [''] * 3
  return [p.name, *sizes, rest, peak, *work]
