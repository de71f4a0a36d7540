"""Writes a Hugging Face folder, tensor by tensor, from a model in memory or from its source checkpoint."""

from collections.abc import Callable
from collections.abc import Iterable
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.hf import copies
from elder_jax.hf import folder as model_folder
from elder_jax.hf import multimodal
from elder_jax.hf import safetensors_files
from elder_jax.hf.cut import pruned_config
from elder_jax.hf.load import check_finite
from elder_jax.hf.load import order_of
from elder_jax.hf.load import turn
from elder_jax.hf.source import Source
from elder_jax.hf.table import Row
from elder_jax.hf.table import param_at
from elder_jax.hf.table import rows_of
from elder_jax.model.decoder import Decoder

# From a row of a family's table to the pieces of that tensor, in Hugging Face's layout.
PiecesOf = Callable[[Row], Iterable[np.ndarray]]


def pieces_of_model(model: Decoder) -> PiecesOf:
  """Takes tensors from a model on the devices; every process must iterate over all of them.

  The function that it returns raises InputError for a tensor with NaN or infinite values.
  """

  def pieces(row: Row):
    preemption.check()
    ours = []
    for part in row.parts:
      array = param_at(model, part.path)[...]
      array = array[row.index] if row.index else array
      # Transposed into the file's order on the device, so that to_hf only makes views on the host.
      theirs = hosts.to_host(turn(array, order_of(part.order), None))
      ours.append(theirs.transpose(part.order))
    tensor = row.to_hf(ours)
    if not safetensors_files.finite(tensor):
      raise InputError(
        f'the tensor {row.name} of the pruned model holds NaN or infinite values, so nothing is exported; use a '
        'lower --lr or --dtype=float32.'
      )
    yield tensor

  return pieces


def pieces_of_source(source: Source, kept: list[int]) -> PiecesOf:
  """Takes tensors from the source's files: a model that only loses layers is never loaded into memory."""
  own = _source_rows(source, kept)

  def pieces(row: Row):
    for piece in source.pieces(own(row).name):
      preemption.check_alone()
      check_finite(piece, source, own(row))
      yield piece

  return pieces


def take_part(pieces_of: PiecesOf, source: Source, kept: list[int]):
  """Called by the other processes while one runs `save_model`: their devices contribute their parts of each tensor."""
  for row in rows_of(source.family, source.spec.with_layers(kept), len(kept)):
    for _ in pieces_of(row):
      pass


def _source_rows(source: Source, kept: list[int]) -> Callable[[Row], Row]:
  """Returns a function from a row of the pruned model to the same tensor's row in the source."""
  rows = {(row.template, *row.index): row for row in rows_of(source.family, source.spec, source.num_layers)}

  def own(row: Row) -> Row:
    return rows[row.template, *row.index] if row.layer is None else rows[row.template, kept[row.layer], *row.index[1:]]

  return own


def config_of(source: Source, kept: list[int], dtype: str, text_only: bool = False) -> dict:
  """config.json of the export: the source's, changed only where the removal or the type of the weights requires it.

  auto_map is deleted: transformers has the code of every family.
  """
  config = pruned_config(source.family, source.config, kept, dtype)
  if source.whole and not text_only:
    config = source.whole.cut_config(config)
  return {key: value for key, value in config.items() if key != 'auto_map'}


def save_model(
  pieces_of: PiecesOf,
  source: Source,
  kept: list[int],
  folder: pathlib.Path,
  dtype: str,
  shard_bytes: int,
  tokenizer: pathlib.Path | None = None,
  text_only: bool = False,
) -> dict[str, str]:
  """Writes the layers `kept` into a Hugging Face folder, which must exist. The host holds one tensor at a time.

  Args:
    pieces_of: pieces_of_model or pieces_of_source.
    dtype: of the tensors; empty: each keeps the source's.
    shard_bytes: largest size of a file, unless one tensor is larger.
    tokenizer: the folder of another tokenizer (model_folder.small_files).
    text_only: write only the language model of a multimodal folder.

  Returns:
    {file name: sha256} of the files with tensors.

  Raises:
    InputError: a tensor is not finite, or does not fit `dtype`.
  """
  parts = None if text_only else source.whole
  _write_json(folder / 'config.json', config_of(source, kept, dtype, text_only))
  _copy_small_files(source, tokenizer, text_only, folder)
  rows = rows_of(source.family, source.spec.with_layers(kept), len(kept))
  own = _source_rows(source, kept)
  dtypes = {row.name: dtype or source.dtypes[own(row).name] for row in rows}

  def size(row):
    return math.prod(row.shape) * jnp.dtype(dtypes[row.name]).itemsize

  shards: list[list[Row]] = [[]]
  for row in rows:
    if shards[-1] and sum(map(size, shards[-1])) + size(row) > shard_bytes:
      shards.append([])
    shards[-1].append(row)

  def called(row: Row) -> str:
    return row.name if parts is None else parts.name_of(row.name, own(row).name)

  count = len(shards) + bool(parts and parts.others)
  numbered = [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]
  names = numbered if count > 1 else ['model.safetensors']
  hashes, weight_map, total = {}, {}, sum(map(size, rows))
  for name, shard in zip(names, shards):
    tensors = [(called(row), row.shape, dtypes[row.name]) for row in shard]
    hashes[name] = safetensors_files.write(folder / name, tensors, lambda i, shard=shard: pieces_of(shard[i]))
    weight_map |= dict.fromkeys(map(called, shard), name)
  if parts and parts.others:
    hashes[names[-1]], num_bytes = copies.write(source.files, parts.others, folder / names[-1])
    weight_map |= dict.fromkeys(parts.others, names[-1])
    total += num_bytes
  if count > 1:
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    _write_json(folder / 'model.safetensors.index.json', index)
  return hashes


def _write_json(path: pathlib.Path, value: dict):
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def _copy_small_files(source: Source, tokenizer: pathlib.Path | None, text_only: bool, folder: pathlib.Path):
  found = model_folder.small_files(source.files, tokenizer)
  if source.whole and text_only:
    found = {name: path for name, path in found.items() if name not in multimodal.FILES_OF_PICTURES}
  model_folder.copy(found, folder)
