"""Parses the text of a compiled TPU program: its collectives, how often each runs, and the compiler's cycle estimate.

XLA's cost_analysis counts the body of a loop once and takes −1 for each unknown custom call. So this module walks the
text: it counts a loop's body as often as its condition allows, and sums the estimated_cycles of the instructions, which
the compiler schedules by. Pallas kernels have no estimate; their FLOPs are counted instead.
"""

import collections
import dataclasses
import math
import re

from elder_jax.run.plan.compile import DEVICES

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's32': 4, 'u32': 4, 'f32': 4, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8}
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
# Cycles per second of a TPU core, from its published peak with all matrix units busy: v4 and v5p have two cores of four
# 128 × 128 units, v5e has one; v6e as v5p.
CLOCK = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9, 'TPU v6 lite': 1.75e9}
# Bytes per second that a chip receives over all its links: 4 or 6 links of 45 GB/s (v5e, v4) or 90 GB/s (v6e, v5p).
LINKS = {'TPU v4': 6 * 45e9, 'TPU v5 lite': 4 * 45e9, 'TPU v5': 6 * 90e9, 'TPU v6 lite': 4 * 90e9}
KERNELS = 0.5  # part of the peak that attention's kernels are taken to reach; the compiler estimates no cycles for them
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\((.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str
  op: str
  rest: str  # operands and attributes


@dataclasses.dataclass(frozen=True)
class Collective:
  kind: str
  shape: str  # of the result, without its layout
  elements: int
  runs: int  # in one call of the program
  received: int  # bytes that each device receives in one run


def elements(shape: str) -> int:
  """Elements of the largest array in a shape, which may be a tuple."""
  return max((math.prod(_sizes(dims)) for _, dims in _ARRAY.findall(shape)), default=0)


def _bytes(shape: str) -> int:
  return sum(BYTES.get(kind, 0) * math.prod(_sizes(dims)) for kind, dims in _ARRAY.findall(shape))


def _sizes(dims: str) -> list[int]:
  return [int(n) for n in dims.split(',') if n]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns ({computation: its instructions}, name of the entry computation)."""
  computations, entry, body = {}, '', []
  for line in text.splitlines():
    if head := _HEAD.match(line):
      body = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif found := _INSTRUCTION.match(line):
      body.append(Instruction(*found.groups()))
  return computations, entry


def _called(instruction: Instruction, attribute: str) -> list[str]:
  found = re.search(rf'\b{attribute}=\{{?((?:%[\w.\-]+(?:, )?)+)', instruction.rest)
  return re.findall(r'%([\w.\-]+)', found[1]) if found else []


def _iterations(computations: dict, loop: Instruction) -> int:
  """How often a loop runs: its limit over what an iteration adds to the counter, as the compiler may unroll by two."""
  condition, body = (computations[_called(loop, name)[0]] for name in ('condition', 'body'))
  limits = [i for i in condition if i.op == 'constant' and i.shape.startswith(('s32[]', 'u32[]'))]
  limit = max(int(i.rest.partition(')')[0]) for i in limits)
  counter = next(i for i in condition if i.op == 'get-tuple-element')
  named, root = {i.name: i for i in body}, body[-1]
  if root.op != 'tuple':
    return limit
  value, added = named[_operands(root)[int(re.search(r'index=(\d+)', counter.rest)[1])]], 0
  while value.op in ('add', 'copy', 'bitcast'):
    operands = [named[name] for name in _operands(value)]
    added += sum(int(i.rest.partition(')')[0]) for i in operands if i.op == 'constant')
    value = next(i for i in operands if i.op != 'constant')
  return math.ceil(limit / max(1, added))


def _cost(computations: dict, name: str) -> tuple[int, int]:
  """(products and kernels, cycles) of a computation and those that it runs."""
  products = cycles = 0
  for i in computations[name]:
    products += i.op in ('convolution', 'dot', 'custom-call')
    cycles += _cycles(i)
    inner = [_called(i, attribute) for attribute in ('body', 'calls', 'to_apply', 'branch_computations')]
    for callee in [c for found in inner for c in found]:
      more = _cost(computations, callee)
      products, cycles = products + more[0], cycles + (0 if i.op == 'fusion' else more[1])
  return products, cycles


def _operands(instruction: Instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+)', instruction.rest.partition(')')[0])


def runs(computations: dict, entry: str) -> tuple[dict[str, int], set[str]]:
  """Returns ({computation: how often one call of the program runs it}, computations inside a fused instruction)."""
  times, fused = collections.Counter(), set()

  def visit(name: str, n: int, inside: bool):
    times[name] += n
    if inside:
      fused.add(name)
    for i in computations[name]:
      if i.op == 'while':
        visit(_called(i, 'body')[0], n * _iterations(computations, i), inside)
      elif i.op == 'conditional':
        # A layer runs or is skipped, and all layers run. Skipping it fills arrays, which can take more cycles.
        visit(max(_called(i, 'branch_computations'), key=lambda b: _cost(computations, b)), n, inside)
      else:
        for callee in _called(i, 'calls') + (_called(i, 'to_apply') if i.op == 'call' else []):
          visit(callee, n, inside or i.op != 'call')

  visit(entry, 1, False)
  return times, fused


def collectives(text: str) -> list[Collective]:
  """The collectives, one per channel: an asynchronous one appears in the text as start, parts and end."""
  computations, entry = parse(text)
  times, _ = runs(computations, entry)
  found = {}
  for name, n in times.items():
    shapes = {i.name: i.shape for i in computations[name]}
    for i in computations[name]:
      kind = i.op.removesuffix('-start')
      if kind not in KINDS:
        continue
      read, out = sum(_bytes(shapes.get(name, '')) for name in _operands(i)), _bytes(i.shape)
      if i.op.endswith('-start'):  # its result includes the operand
        out = max(out - read, read) if kind == 'all-gather' else read
      received = {'all-gather': out - read, 'reduce-scatter': read - out, 'all-reduce': 2 * read}.get(kind, read)
      arrays = [f'{t}[{dims}]' for t, dims in _ARRAY.findall(i.shape)]
      shape = max(arrays, key=elements)
      channel = re.search(r'channel_id=(\d+)', i.rest)
      key = (kind, channel[1] if channel else f'{name}/{i.name}')
      if key not in found or found[key].runs < n:
        found[key] = Collective(kind, shape, elements(shape), n, received)
  return list(found.values())


def _cycles(instruction: Instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
  return int(found[1]) if found else 0


def cycles(text: str) -> int:
  """The compiler's estimate of the cycles of one core in a call, without collectives that run concurrently."""
  computations, entry = parse(text)
  times, fused = runs(computations, entry)
  total = 0
  for name, n in times.items():
    if name not in fused:
      total += n * sum(map(_cycles, computations[name]))
  return total


# Products over (queries, keys, head width) in each kernel of splash attention.
_SPLASH = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}
_BLOCK = 512  # tokens of a kernel's block: blocks after a query are skipped


def estimate(text: str, kind: str) -> dict[str, float]:
  """Seconds of a call on a TPU of this kind: of the kernels, of all computation with them, and of the links alone."""
  kernels_s = kernel_flops(text) / (KERNELS * DEVICES[kind][0])
  received = sum(c.runs * c.received for c in collectives(text))
  return {
    'kernels_s': kernels_s,
    'compute_s': cycles(text) / CLOCK[kind] + kernels_s,
    'links_s': received / LINKS[kind],
  }


def kernel_flops(text: str) -> float:
  """FLOPs of a device in the kernels of causal splash attention, for which the compiler estimates no cycles."""
  computations, entry = parse(text)
  times, _ = runs(computations, entry)
  total = 0.0
  for name, n in times.items():
    for i in computations[name]:
      kind = next((k for k in _SPLASH if i.name.startswith(k)), None)
      if kind is None or i.op != 'custom-call':
        continue
      operands = i.rest.partition('operand_layout_constraints={')[2]
      query = next(dims for dtype, dims in _ARRAY.findall(operands) if dtype in ('bf16', 'f32'))  # after the mask's s8
      sizes = _sizes(query)  # batch, heads, tokens, head width
      seen = sizes[-2] * (1 + _BLOCK / sizes[-2]) / 2
      total += n * 2 * _SPLASH[kind] * math.prod(sizes) * seen
  return total
