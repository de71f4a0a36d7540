"""A run that only takes given layers out of a model that the decoder does not know, or whose weights are quantised."""

import os
import shutil
import time

from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.hf import folder as model_folder
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.hf.by_name import folder as by_name
from elder_jax.hf.by_name import keys
from elder_jax.hf.by_name import structure
from elder_jax.hf.by_name.folder import Checkpoint
from elder_jax.hf.source import architecture
from elder_jax.hf.source import read_config
from elder_jax.log import RunLog
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
from elder_jax.run.report import markdown


def why(config: Config) -> str:
  """Why this run goes by the names of tensors; empty where the decoder knows the model, or the run does more than cut.

  Raises:
    InputError: --layers_at in a run that does more.
  """
  removal, at = config.removal, config.removal.layers_at
  reads = config.evaluation.eval_data or config.evaluation.tasks or config.validates()
  only_cuts = removal.remove_layers is not None and config.recipes() == ['none'] and not reads
  if at and (not only_cuts or model_folder.is_gguf(config.paths.model)):
    raise InputError(
      'layers_at',
      at,
      'is read where layers are only cut from a Hugging Face folder: with --remove_layers, --recipe=none, --compare= and '
      'nothing to measure.',
    )
  if not only_cuts or model_folder.is_gguf(config.paths.model):
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
  checkpoint = by_name.open_checkpoint(config.paths.model, config.removal.layers_at)
  kept = _kept(config, checkpoint)
  cut = keys.cut_config(checkpoint.config, checkpoint.layers, kept, checkpoint.name)
  checked = _check_structure(config, checkpoint, cut, kept)
  tokenizer = None
  if config.paths.tokenizer:
    tokenizer = model_folder.find('tokenizer', config.paths.tokenizer, 'tokenizer')
  model_folder.small_files(checkpoint.files, tokenizer)  # what the export needs can be read
  needed, _ = by_name.size_left(checkpoint, kept)
  if (free := shutil.disk_usage(config.path()).free) < needed:
    raise InputError(
      'workdir',
      config.paths.workdir,
      f'the export needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; free some space or choose another '
      'folder.',
    )
  read = {inputs.named('model', config.paths.model): inputs.of_folder(checkpoint.files)}
  inputs.check(config.path(), read)
  workdir.record(config, read)
  with workdir.noting_failure(config):
    return _export(config, checkpoint, kept, cut, tokenizer, checked, begun)


def _kept(config: Config, checkpoint: Checkpoint) -> list[int]:
  removed, depth = list(config.removal.remove_layers or ()), checkpoint.layers.depth
  check_given(removed, depth)
  return pruning.kept_layers(depth, removed)


def _check_structure(config: Config, checkpoint: Checkpoint, cut: dict, kept: list[int]) -> str:
  """Empty where transformers makes of the result what is left of the original; else why it was not asked."""
  why_not = '--verify=jax' if config.output.verify == 'jax' else structure.why_unchecked(checkpoint.config)
  if why_not and config.output.verify == 'torch':
    raise InputError('verify', 'torch', f'{why_not}; use --verify=auto.')
  if not why_not:
    structure.check(checkpoint.config, cut, checkpoint.layers, kept, checkpoint.name)
  return why_not


def _export(
  config: Config, checkpoint: Checkpoint, kept: list[int], cut: dict, tokenizer, unchecked: str, begun
) -> dict:
  work = config.path()
  temporary, final = work / 'export.partial', work / 'export'
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  progress = RunLog(work / 'metrics.jsonl').progress('copying, MB')
  hashes = by_name.write(checkpoint, kept, cut, temporary, progress, tokenizer)
  try:
    tensors = by_name.check(checkpoint, kept, temporary)
  except ValueError as e:
    raise verify.ExportMismatch(str(e)) from e
  report = _report(config, checkpoint, kept, {'tensors': tensors, **({'torch_error': unchecked} if unchecked else {})})
  report['seconds'] = {'cut': round(time.monotonic() - begun, 1)}
  write_json(temporary / lineage.NAME, {'lineage': report['lineage']})
  write_whole(temporary / 'README.md', model_card(report, config.to_json()))
  manifest.write(temporary, hashes)
  shutil.rmtree(final, ignore_errors=True)
  os.replace(temporary, final)
  write_whole(work / 'report.md', markdown(report))
  write_json(work / 'report.json', report)
  return report


def _report(config: Config, checkpoint: Checkpoint, kept: list[int], verified: dict) -> dict:
  """report.json as every run has it; nothing was measured."""
  depth, removed = checkpoint.layers.depth, sorted(config.removal.remove_layers or ())
  quantised = isinstance(checkpoint.config.get('quantization_config'), dict)  # elements are no parameters then
  sizes = [by_name.size_left(checkpoint, layers) for layers in (list(range(depth)), kept)]
  params = dict(zip(('dense', 'pruned'), (None if quantised else elements for _, elements in sizes)))
  row = {'method': 'given', 'recipe': 'none', 'removed': removed, 'ppl': {}, 'tasks': {}}
  return {
    'schema': SCHEMA,
    'model': config.paths.model,
    'num_layers': depth,
    'layers_at': checkpoint.layers.prefix.removesuffix('.'),
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
    'lineage': [*lineage.of_folder(checkpoint.files), lineage.step_of(config, depth, removed)],
    'steps': 0,
    'tokens_per_step': 0,
    'verify': verified,
    'versions': about.package_versions(),
    'device': about.device_name(),
  }
