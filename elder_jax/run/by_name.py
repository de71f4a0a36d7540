"""A run that only takes given layers out of a model that the decoder does not know, or whose weights are quantised."""

from collections.abc import Callable
import dataclasses
import math
import os
import pathlib
import re
import shutil
import time

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
from elder_jax.hf.gguf import cut as gguf_cut
from elder_jax.hf.gguf.source import parts_of
from elder_jax.hf.source import architecture
from elder_jax.hf.source import read_config
from elder_jax.log import RunLog
from elder_jax.log import in_megabytes
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.log import write_whole
from elder_jax.model import pruning
from elder_jax.run import inputs
from elder_jax.run import lineage
from elder_jax.run import workdir
from elder_jax.run.card import model_card
from elder_jax.run.config import Config
from elder_jax.run.how_much import check_given
from elder_jax.run.report import SCHEMA
from elder_jax.run.results import write_pages
from elder_jax.text.identity import of_files


@dataclasses.dataclass(frozen=True)
class Cutter:
  """A checkpoint of one format, opened by its headers.

  depth: its number of layers.
  files: the folder that it is in.
  sha256: of what is read.
  params: its elements are its parameters.
  at: the list of layers, by its name.
  prepare: (layers kept) -> why PyTorch was not asked about the result, or ''; raises InputError where they cannot be cut.
  size: (layers kept) -> (octets, elements) of their tensors and of those of no layer.
  write: (layers kept, folder, progress) -> {file: sha256}.
  check: (layers kept, folder) -> number of tensors; raises ValueError for one that is not the original's.
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
  """Why this run goes by the names of tensors; empty where the decoder knows the model, or the run does more than cut.

  Raises:
    InputError: --layers_at or --export_format=gguf in a run that does more.
  """
  removal, at, to_gguf = config.removal, config.removal.layers_at, config.output.export_format == 'gguf'
  reads = config.evaluation.eval_data or config.evaluation.tasks or config.validates()
  only_cuts = removal.remove_layers is not None and config.recipes() == ['none'] and not reads
  is_gguf = model_folder.is_gguf(config.paths.model)
  how = 'with --remove_layers, --recipe=none, --compare= and nothing to measure.'
  if at and (not only_cuts or is_gguf):
    raise InputError('layers_at', at, f'is read where layers are only cut from a Hugging Face folder: {how}')
  if to_gguf and not (only_cuts and is_gguf):
    raise InputError('export_format', 'gguf', f'is for layers that are only cut from a .gguf file: {how}')
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
    return f'the decoder does not know it ({e.why})'
  return ''


def run(config: Config, reason: str) -> dict:
  """Cuts the layers, checks the result and returns the report.

  Args:
    reason: of `why`.
  """
  with workdir.held(config):
    hosts.leader_first(lambda: workdir.claim_workdir(config) if hosts.is_leader() else None)
    if report := workdir.finished(config):
      log(f'{config.path()} holds a finished run; its report follows, its inputs are not read again')
      return report
    log(f'--model={config.paths.model}: {reason}; layers are cut by the names of the tensors, from file to file')
    return hosts.broadcast_json(hosts.leader_first(lambda: _cut(config) if hosts.is_leader() else None))


def _cut(config: Config) -> dict:
  begun = time.monotonic()
  if config.output.export_dtype:
    raise InputError(
      'export_dtype', config.output.export_dtype, 'is for models that are read; tensors are copied as they are here.'
    )
  if config.output.text_only:
    raise InputError('text_only', True, 'is for models that are read; every tensor is copied here. Leave the flag out.')
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
      f'the export needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; free some space or choose another '
      'folder.',
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
  model_folder.small_files(checkpoint.files, tokenizer)  # what the export needs can be read

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
    write=lambda kept, folder, told: by_name.write(checkpoint, kept, cut(kept), folder, told, tokenizer),
    check=lambda kept, folder: by_name.check(checkpoint, kept, folder),
  )


def _of_gguf(config: Config) -> Cutter:
  path = user_path(config.paths.model)
  if config.paths.tokenizer:
    raise InputError('tokenizer', config.paths.tokenizer, 'a .gguf file holds its own tokenizer; leave it out.')
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
    write=lambda kept, folder, told: {name(kept): gguf_cut.write(opened, kept, folder / name(kept), told)},
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
  write_whole(temporary / 'README.md', model_card(report, config.to_json()))
  manifest.write(temporary, hashes)
  shutil.rmtree(final, ignore_errors=True)
  os.replace(temporary, final)
  write_pages(report, work, config.paths.workdir)
  write_json(work / 'report.json', report)
  return report


def _report(config: Config, cutter: Cutter, kept: list[int], verified: dict) -> dict:
  """report.json as every run has it; nothing was measured."""
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
    'gigabytes': dict(zip(('dense', 'pruned'), (octets / 1e9 for octets, _ in sizes))),
    'lineage': [*lineage.of_folder(cutter.files), lineage.step_of(config, depth, removed)],
    'steps': 0,
    'tokens_per_step': 0,
    'verify': verified,
    'versions': about.package_versions(),
    'device': about.device_name(),
  }
