"""Cuts given layers from a model by the names of its tensors, without loading it.

For models that the decoder does not support and for quantised weights.
"""

from collections.abc import Callable
import dataclasses
import math
import os
import pathlib
import re
import shutil
import time

from elder_jax import extras
from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import folder as model_folder
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.hf.by_name import folder as by_name
from elder_jax.hf.by_name import keys
from elder_jax.hf.by_name import structure
from elder_jax.hf.source import architecture
from elder_jax.hf.source import read_config
from elder_jax.log import RunLog
from elder_jax.log import in_megabytes
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.model import pruning
from elder_jax.run import inputs
from elder_jax.run import lineage
from elder_jax.run import origin
from elder_jax.run import workdir
from elder_jax.run.card import write_card
from elder_jax.run.config import Config
from elder_jax.run.how_much import check_given
from elder_jax.run.report import SCHEMA
from elder_jax.run.results import write_pages
from elder_jax.text.identity import of_files


@dataclasses.dataclass(frozen=True)
class Cutter:
  """A checkpoint in one format, of which only the headers have been read.

  depth: the number of layers.
  files: the folder that holds it.
  sha256: of the files that are read.
  params: whether the number of elements is the number of parameters; not so for quantised weights.
  at: the name of the list of layers.
  prepare: (layers kept) -> why PyTorch does not check the result, or ''. Raises InputError if the layers cannot be cut.
  size: (layers kept) -> (bytes, elements) of the export's tensors.
  write: (layers kept, folder, progress) -> {file: sha256}.
  check: (layers kept, folder) -> number of tensors. Raises ValueError for a tensor that differs from the original.
  """

  depth: int
  files: pathlib.Path
  sha256: str
  params: bool
  at: str
  prepare: Callable[[list[int]], str]
  size: Callable[[list[int]], tuple[int, int]]
  write: Callable[[list[int], pathlib.Path, Callable], dict[str, str]]
  check: Callable[[list[int], pathlib.Path], int]


def why(config: Config) -> str:
  """Returns why this run cuts layers by the names of tensors, or '' if it does not.

  It does not if the decoder supports the model, or if the run does more than cut layers.

  Raises:
    InputError: --layers_at or --export_format=gguf in a run that does more than cut layers.
  """
  removal, at, to_gguf = config.removal, config.removal.layers_at, config.output.export_format == 'gguf'
  reads = config.evaluation.eval_data or config.evaluation.tasks or config.validates()
  only_cuts = removal.remove_layers is not None and config.recipes() == ['none'] and not reads
  is_gguf = model_folder.is_gguf(config.paths.model)
  how = 'use it with --remove_layers, --recipe=none, --compare= and nothing to measure.'
  if at and (not only_cuts or is_gguf):
    raise InputError('layers_at', at, f'only applies when layers are cut from a Hugging Face folder; {how}')
  if to_gguf and not (only_cuts and is_gguf):
    raise InputError('export_format', 'gguf', f'only applies when layers are cut from a .gguf file; {how}')
  if to_gguf:
    return '--export_format=gguf'
  if not only_cuts or is_gguf:
    return ''
  return f'--layers_at={at}' if at else hosts.leader_first(lambda: _why_not_decoder(config.paths.model))


def _why_not_decoder(model: str) -> str:
  config = read_config(model)
  if isinstance(config.get('quantization_config'), dict):
    return 'its weights are quantised'
  try:
    architecture(model, config)
  except InputError as e:
    return f'the decoder does not support it ({e.why})'
  return ''


def run(config: Config, reason: str) -> dict:
  """Cuts the layers, checks the result and returns the report.

  Args:
    reason: what `why` returned.
  """
  with workdir.held(config):
    hosts.leader_first(lambda: workdir.claim_workdir(config) if hosts.is_leader() else None)
    if report := workdir.finished(config):
      log(f'{config.path()} holds a finished run; printing its report without reading the inputs again')
      return report
    log(f'--model={config.paths.model}: {reason}; cutting layers by the names of the tensors, from file to file')
    return hosts.broadcast_json(hosts.leader_first(lambda: _cut(config) if hosts.is_leader() else None))


def _cut(config: Config) -> dict:
  begun = time.monotonic()
  if config.output.export_dtype:
    raise InputError(
      'export_dtype',
      config.output.export_dtype,
      'does not apply to this run, which copies tensors unchanged; leave the flag out.',
    )
  if config.output.text_only:
    raise InputError('text_only', True, 'does not apply to this run, which copies every tensor; leave the flag out.')
  cutter = _of_gguf(config) if config.output.export_format == 'gguf' else _of_folder(config)
  removed = list(config.removal.remove_layers or ())
  check_given(removed, cutter.depth)
  kept = pruning.kept_layers(cutter.depth, removed)
  unchecked = cutter.prepare(kept)
  needed, _ = cutter.size(kept)
  if (free := shutil.disk_usage(config.path()).free) < needed:
    raise InputError(
      'workdir',
      config.paths.workdir,
      f'the export needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; free some space or choose '
      'another folder.',
    )
  read = {inputs.named('model', config.paths.model): cutter.sha256}
  inputs.check(config.path(), read)
  workdir.record(config, read)
  with workdir.noting_failure(config):
    return _export(config, cutter, kept, unchecked, begun)


def _of_folder(config: Config) -> Cutter:
  checkpoint = by_name.open_checkpoint(config.paths.model, config.removal.layers_at)
  tokenizer = None
  if config.paths.tokenizer:
    tokenizer = model_folder.find('tokenizer', config.paths.tokenizer, 'tokenizer')
  model_folder.small_files(checkpoint.files, tokenizer)  # raises for a file that cannot be read

  def cut(kept: list[int]) -> dict:
    return keys.cut_config(checkpoint.config, checkpoint.layers, kept, checkpoint.name)

  def prepare(kept: list[int]) -> str:
    new = cut(kept)
    why_not = '--verify=jax' if config.output.verify == 'jax' else structure.why_unchecked(checkpoint.config)
    if why_not and config.output.verify == 'torch':
      raise InputError('verify', 'torch', f'{why_not}; use --verify=auto.')
    if not why_not:
      structure.check(checkpoint.config, new, checkpoint.layers, kept, checkpoint.name)
    return why_not

  return Cutter(
    depth=checkpoint.layers.depth,
    files=checkpoint.files,
    sha256=inputs.of_folder(checkpoint.files),
    params=not isinstance(checkpoint.config.get('quantization_config'), dict),
    at=checkpoint.layers.prefix.removesuffix('.'),
    prepare=prepare,
    size=lambda kept: by_name.size_left(checkpoint, kept),
    write=lambda kept, folder, progress: by_name.write(checkpoint, kept, cut(kept), folder, progress, tokenizer),
    check=lambda kept, folder: by_name.check(checkpoint, kept, folder),
  )


def _of_gguf(config: Config) -> Cutter:
  path = user_path(config.paths.model)
  if config.paths.tokenizer:
    raise InputError('tokenizer', config.paths.tokenizer, 'a .gguf file has its own tokenizer; leave the flag out.')
  extras.require('gguf', 'a .gguf file', 'model', config.paths.model)
  from elder_jax.hf.gguf import cut as gguf_cut  # not at the top: they need the package gguf
  from elder_jax.hf.gguf.source import parts_of

  opened = gguf_cut.open_file(path)

  def name(kept: list[int]) -> str:
    return f'{re.sub("-[0-9]{5}-of-[0-9]{5}$", "", path.stem)}-{len(kept)}-layers.gguf'

  def prepare(kept: list[int]) -> str:
    gguf_cut.cut_fields(opened, kept)
    return ''

  def size(kept: list[int]) -> tuple[int, int]:
    left = [t for t in opened.tensors if gguf_cut.renamed(t.name, kept) is not None]
    return sum(t.data.nbytes for t in left), sum(math.prod(t.shape) for t in left)

  return Cutter(
    depth=opened.depth,
    files=path.parent,
    sha256=of_files(parts_of(path)),
    params=True,
    at='blk',
    prepare=prepare,
    size=size,
    write=lambda kept, folder, progress: {name(kept): gguf_cut.write(opened, kept, folder / name(kept), progress)},
    check=lambda kept, folder: gguf_cut.check(opened, kept, folder / name(kept)),
  )


def _export(config: Config, cutter: Cutter, kept: list[int], unchecked: str, begun: float) -> dict:
  work = config.path()
  temporary, final = work / 'export.partial', work / 'export'
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  hashes = cutter.write(kept, temporary, in_megabytes(RunLog(work / 'metrics.jsonl').progress('copying, MB')))
  try:
    tensors = cutter.check(kept, temporary)
  except ValueError as e:
    raise verify.ExportMismatch(str(e)) from e
  report = _report(config, cutter, kept, {'tensors': tensors} | ({'torch_error': unchecked} if unchecked else {}))
  report['seconds'] = {'cut': round(time.monotonic() - begun, 1)}
  write_json(temporary / lineage.NAME, {'lineage': report['lineage']})
  write_card(temporary, report, config.to_json())
  manifest.write(temporary, hashes)
  shutil.rmtree(final, ignore_errors=True)
  os.replace(temporary, final)
  write_pages(report, work, config.paths.workdir)
  write_json(work / 'report.json', report)
  return report


def _report(config: Config, cutter: Cutter, kept: list[int], verified: dict) -> dict:
  """The contents of report.json, with the same keys as for any run; nothing was measured."""
  depth, removed = cutter.depth, sorted(config.removal.remove_layers or ())
  sizes = [cutter.size(layers) for layers in (list(range(depth)), kept)]
  params = dict(zip(('dense', 'pruned'), (elements if cutter.params else None for _, elements in sizes)))
  row = {'method': 'given', 'recipe': 'none', 'removed': removed, 'ppl': {}, 'tasks': {}}
  return {
    'schema': SCHEMA,
    'model': config.paths.model,
    'num_layers': depth,
    'layers_at': cutter.at,
    'format': config.output.export_format,
    'removed': removed,
    'order': removed,
    'kept': kept,
    'method': 'given',
    'recipe': 'none',
    'gates': [],
    'choices': [{'method': 'given', 'num_remove': len(removed), 'chosen': removed, 'scores': [], 'gates': []}],
    'ppl': {},
    'tasks': {'dense': {}, 'pruned': {}},
    'rows': [row],
    'heals': False,
    'teacher': None,
    'held_out_loss': None,
    'train_data': [],
    'answers': [],
    'corpora': {},
    'params': params,
    'gigabytes': dict(zip(('dense', 'pruned'), (size / 1e9 for size, _ in sizes))),
    'lineage': [*lineage.of_folder(cutter.files), lineage.step_of(config, depth, removed)],
    'origin': origin.read(config.paths.model, cutter.files),
    'steps': 0,
    'tokens_per_step': 0,
    'verify': verified,
    'versions': about.package_versions(),
    'device': about.device_name(),
  }
