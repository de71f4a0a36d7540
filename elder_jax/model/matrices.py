"""Which parameters of a Decoder are matrices: what decays, what LoRA changes, what methods weigh."""

from flax import nnx


def is_matrix(path) -> bool:
  """Whether a leaf of a Decoder, by its path in the tree, is of a matrix: the layers', embeddings, the head.

  By name, since stacked biases and norms have two axes as well.
  """
  return is_layer_matrix(path) or _name(path, 0) in ('embed', 'positions', 'head')


def is_layer_matrix(path) -> bool:
  """The same of the layers alone; LoRA's factors count as their matrix."""
  return _name(path, 0) == 'layers' and _name(path, 1).startswith('w')


def _name(path, i: int) -> str:
  return getattr(path[i], 'name', '') if i < len(path) else ''


def layer_matrices(layers) -> dict[str, nnx.Param]:
  """{name: matrix, or the Lora in its place}, sorted by name, but for those of experts."""
  found = {name: p for name, p in sorted(vars(layers).items()) if name.startswith('w') and p is not None}
  return {name: p for name, p in found.items() if not isinstance(p, nnx.Param) or 'E' not in p.get_metadata()['axes']}
