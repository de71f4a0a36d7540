"""Which parameters of a Decoder are matrices. Weight decay, LoRA and the methods taylor and magnitude use this."""

from flax import nnx


def is_matrix(path) -> bool:
  """Whether the leaf at this path of a Decoder is a matrix: one of the layers', an embedding, or the head.

  Decided by name, because stacked biases and norms have two axes as well.
  """
  return is_layer_matrix(path) or _name(path, 0) in ('embed', 'positions', 'head')


def is_layer_matrix(path) -> bool:
  """Whether the leaf at this path is a matrix of the layers. LoRA's factors count as matrices."""
  return _name(path, 0) == 'layers' and _name(path, 1).startswith('w')


def _name(path, i: int) -> str:
  return getattr(path[i], 'name', '') if i < len(path) else ''


def layer_matrices(layers) -> dict[str, nnx.Param]:
  """Returns {name: matrix, or the Lora in its place}, sorted by name, without the matrices of experts."""
  found = {name: p for name, p in sorted(vars(layers).items()) if name.startswith('w') and p is not None}
  return {name: p for name, p in found.items() if not isinstance(p, nnx.Param) or 'E' not in p.get_metadata()['axes']}
