"""Writes a checkpoint without some of its layers: tensors are copied byte for byte, into the same shards."""

from collections.abc import Callable
from collections.abc import Iterable
import hashlib
import json
import math
import pathlib
from typing import NamedTuple

from elder_jax.devices import preemption
from elder_jax.hf import copies
from elder_jax.hf import folder as model_folder
from elder_jax.hf import safetensors_files
from elder_jax.hf.by_name import keys
from elder_jax.hf.by_name import layer_list
from elder_jax.hf.by_name.layer_list import LayerList

_QUANTISATION = ('quantize_config.json', 'quant_config.json', 'hf_quant_config.json')


class Checkpoint(NamedTuple):
  """A Hugging Face folder of which only config.json and the safetensors headers were read."""

  name: str  # as the user wrote it
  files: pathlib.Path  # the folder
  config: dict
  headers: dict[pathlib.Path, tuple[int, dict]]  # safetensors file -> (offset of its first tensor, {name: header})
  layers: LayerList


def open_checkpoint(model: str, at: str = '') -> Checkpoint:
  """Reads config.json and the safetensors headers of a folder or hub id, but no tensor.

  Args:
    at: the value of --layers_at.

  Raises:
    InputError: a file is missing or damaged, or layer_list.find finds no single list of layers.
  """
  folder = model_folder.find('model', model)
  config = safetensors_files.read_json(folder / 'config.json')
  headers = safetensors_files.headers(folder)
  names = [name for _, header in headers.values() for name in header]
  return Checkpoint(model, folder, config, headers, layer_list.find(names, config, model, at))


def write(
  checkpoint: Checkpoint,
  kept: list[int],
  config: dict,
  folder: pathlib.Path,
  progress: Callable[[int, int], None],
  tokenizer: pathlib.Path | None = None,
) -> dict[str, str]:
  """Writes the layers `kept` into `folder`, which must exist.

  Args:
    config: config.json of the result.
    progress: called with (bytes written, bytes in total).
    tokenizer: the folder of another tokenizer (hf.folder.small_files).

  Returns:
    {file: sha256} of the safetensors files.
  """
  files = model_folder.small_files(checkpoint.files, tokenizer)
  model_folder.copy(files, folder)
  for name in _QUANTISATION:
    if (path := checkpoint.files / name).is_file():
      value = safetensors_files.read_json(path)
      _write_json(folder / name, keys.renamed_strings(value, checkpoint.layers, kept, checkpoint.name))
  _write_json(folder / 'config.json', config)
  plan = {path: _plan(header, checkpoint.layers, kept) for path, (_, header) in checkpoint.headers.items()}
  total, done, hashes, weight_map = _sum(plan.values()), 0, {}, {}
  for path, tensors in plan.items():
    if not tensors:
      continue
    pieces = copies.content(path, checkpoint.headers[path][0], tensors)
    digest, size = hashlib.sha256(), 0
    with (folder / path.name).open('wb') as file:
      for piece in pieces:
        preemption.check_alone()
        file.write(piece)
        digest.update(piece)
        size += len(piece)
        progress(min(done + size, total), total)
      safetensors_files.sync(file)
    done += _sum([tensors])
    hashes[path.name] = digest.hexdigest()
    weight_map |= dict.fromkeys((new for _, new, _ in tensors), path.name)
  if list(hashes) != ['model.safetensors']:
    index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}
    _write_json(folder / 'model.safetensors.index.json', index)
  return hashes


def check(checkpoint: Checkpoint, kept: list[int], folder: pathlib.Path) -> int:
  """Compares the tensors in `folder` with the original's, byte for byte, and returns their number.

  Raises:
    ValueError: a tensor differs, or is not in the original.
  """
  written, count = safetensors_files.headers(folder), 0
  home = {name: (path, begin, about) for path, (begin, of) in written.items() for name, about in of.items()}
  for path, (begin, header) in checkpoint.headers.items():
    for _, new, about in _plan(header, checkpoint.layers, kept):
      copy, copy_begin, copy_about = home.pop(new)
      pieces = copies.pieces(path, begin, about), copies.pieces(copy, copy_begin, copy_about)
      same = copy_about['dtype'] == about['dtype'] and copy_about['shape'] == about['shape']
      if not same or any(a != b for a, b in zip(*pieces, strict=True)):
        raise ValueError(f'{copy}: the tensor {new} differs from the original')
      count += 1
  if home:
    raise ValueError(f'{folder}: the tensor {next(iter(home))} is not in the original')
  return count


def _plan(header: dict, layers: LayerList, kept: list[int]) -> list[tuple[str, str, dict]]:
  """(old name, new name, header) of the tensors of a file that remain, in the order of the file."""
  of_file = sorted(header.items(), key=lambda item: item[1]['data_offsets'])
  return [(name, new, about) for name, about in of_file if (new := layers.renamed(name, kept)) is not None]


def size_left(checkpoint: Checkpoint, kept: list[int]) -> tuple[int, int]:
  """(bytes, elements) of the tensors that remain."""
  plans = [_plan(header, checkpoint.layers, kept) for _, header in checkpoint.headers.values()]
  return _sum(plans), sum(math.prod(about['shape']) for tensors in plans for _, _, about in tensors)


def _sum(plans: Iterable[list[tuple[str, str, dict]]]) -> int:
  return sum(copies.size(about) for tensors in plans for _, _, about in tensors)


def _write_json(path: pathlib.Path, value: dict):
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
