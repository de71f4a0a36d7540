"""Converts between Hugging Face tensors and slices of our parameters, in both directions, by a family's table."""

from collections.abc import Iterable
import dataclasses
import functools
import math
import re

from flax import nnx
import jax
from jax.sharding import Mesh
import numpy as np

from elder_jax.devices import sharding
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Spec


@dataclasses.dataclass(frozen=True)
class Part:
  """A slice of one of our parameters, as a part of a Hugging Face tensor."""

  path: str  # in Decoder
  shape: tuple[int, ...]  # in Hugging Face's layout
  folded: tuple[int, ...]  # the shape with an axis for each letter of the rule; '*' is an axis of size 1
  order: tuple[int, ...]  # for each axis of ours, its position among the letters


@dataclasses.dataclass(frozen=True)
class Row:
  """One Hugging Face tensor and its parts: one slice of ours, or several that are fused."""

  template: str  # the name, with {l} for the layer and {e} for the expert
  layer: int | None  # index on our leading axis
  parts: tuple[Part, ...]
  dim: int | None  # dimension of the tensor in which parts are fused: '+' concatenated, '*' interleaved
  star: int | None  # for '*', the axis of the folded shape along which the parts alternate
  expert: int | None = None  # index on our second axis

  @property
  def name(self) -> str:
    return self.template.format(l=self.layer, e=self.expert)

  @property
  def index(self) -> tuple[int, ...]:
    """Index of the slice in our parameters."""
    return tuple(i for i in (self.layer, self.expert) if i is not None)

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(
      sum(part.shape[j] for part in self.parts) if j == self.dim else n for j, n in enumerate(self.parts[0].shape)
    )

  def to_ours(self, tensor) -> list:
    """From the Hugging Face tensor to our slices, in the order of `parts`."""
    if self.dim is None:
      pieces = [tensor]
    elif self.star is None:
      pieces = np.split(tensor, np.cumsum([part.shape[self.dim] for part in self.parts])[:-1], self.dim)
    else:
      folded = self.parts[0].folded
      pieces = np.split(
        tensor.reshape(*folded[: self.star], len(self.parts), *folded[self.star + 1 :]), len(self.parts), self.star
      )
    return [
      np.reshape(piece, [n for i, n in enumerate(part.folded) if i != self.star]).transpose(part.order)
      for part, piece in zip(self.parts, pieces)
    ]

  def to_hf(self, ours: list):
    """The inverse of to_ours."""
    pieces = [a.transpose(np.argsort(part.order)) for part, a in zip(self.parts, ours)]
    shapes = [part.shape if self.star is None else part.folded for part in self.parts]
    pieces = [piece.reshape(shape) for piece, shape in zip(pieces, shapes)]
    if self.dim is None:
      return pieces[0]
    return np.concatenate(pieces, self.dim if self.star is None else self.star).reshape(self.shape)


def make_row(template: str, layer: int | None, entry, sizes: dict[str, int], expert: int | None = None) -> Row:
  """A row of a family's table.

  Args:
    entry: (path, rule), or several of these if the tensor is fused. families/llama.py explains the rules 'HF->ours'; in
      those of fused parts, '+' or '*' marks the dimension.
    sizes: of the letters (Spec.sizes).
  """
  parts, size = [], sizes | {'*': 1}
  for path, rule in (entry,) if isinstance(entry[0], str) else entry:
    theirs, ours = rule.replace('+', '').split('->')
    axes = theirs.replace(',', '') or ours  # a scalar has one axis of size 1 in our layout
    dims, letters = theirs.split(',') if theirs else [], axes.replace('*', '')
    shape, folded = (math.prod(size[a] for a in dim) for dim in dims), (size[a] for a in axes)
    parts.append(Part(path, tuple(shape), tuple(folded), tuple(letters.index(a) for a in ours)))
  dim = next((j for j, text in enumerate(rule.split(',')) if {'+', '*'} & set(text)), None)
  star = theirs.replace(',', '').index('*') if '*' in theirs else None
  return Row(template, layer, tuple(parts), dim, star, expert)


@functools.lru_cache(maxsize=8)
def abstract_decoder(spec: Spec, num_layers: int) -> Decoder:
  """The Decoder of this spec with shapes in place of arrays. It is cached: do not change it."""
  return jax.eval_shape(lambda: Decoder(spec, num_layers, jax.random.key(0)))


def abstract_model(spec: Spec, num_layers: int, dtype: str, mesh: Mesh, flag: tuple[int, ...]) -> Decoder:
  """What load_model returns, with shapes and shardings in place of arrays.

  Args:
    flag: the value of --mesh, for errors.
  """
  model = abstract_decoder(spec, num_layers)

  def shape(p, place):
    of_type = 'float32' if p.get_metadata()['axes'] == 'L' else dtype  # gates
    return p.replace(jax.ShapeDtypeStruct(p.get_value().shape, of_type, sharding=place.get_value()))

  places = sharding.for_model(model, mesh, flag)
  return jax.tree.map(shape, model, places, is_leaf=lambda a: isinstance(a, nnx.Variable))


def rows_of(family, spec: Spec, num_layers: int) -> list[Row]:
  """A row for each tensor of the checkpoint, in file order, without those that this spec does not have."""
  sizes, model, rows = spec.sizes(num_layers), abstract_decoder(spec, num_layers), []
  for name, entry in family.WEIGHTS.items():
    if entry is None or param_at(model, entry[0] if isinstance(entry[0], str) else entry[0][0]) is None:
      continue
    layers = _layers_with(name, family, spec, num_layers) if '{l}' in name else [None]
    experts = range(spec.experts) if '{e}' in name else [None]
    rows += [make_row(name, l, entry, sizes, e) for l in layers for e in experts]
  embeds = ('embed', 'positions')

  def place(row):
    return row.layer if row.layer is not None else -1 if row.parts[0].path in embeds else num_layers

  return sorted(rows, key=place)


def _layers_with(name: str, family, spec: Spec, num_layers: int) -> list[int]:
  """The layers that have a tensor of this name."""
  only = next((kind for part, kind in getattr(family, 'ONLY', {}).items() if part in name), None)
  return [l for l in range(num_layers) if only is None or spec.mixer_L[l] == only]


def pattern_of(templates: Iterable[str]) -> re.Pattern:
  """A pattern that matches the names of these templates for any layer and expert."""
  return re.compile('|'.join(re.sub(r'\\{[le]\\}', r'\\d+', re.escape(name)) for name in templates))


def param_at(model: Decoder, path: str):
  """The nnx.Param at a dotted path, or None if the Decoder has none."""
  for name in path.split('.'):
    model = getattr(model, name, None)
  return model
