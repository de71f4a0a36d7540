"""The exported folder: written under a temporary name, checked, then renamed."""

import os
import pathlib
import shutil

import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import pieces_of_source
from elder_jax.hf.save import save_model
from elder_jax.hf.save import take_part
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.run import lineage
from elder_jax.run.card import write_card
from elder_jax.run.job import Job
from elder_jax.run.job import Run
from elder_jax.run.results import cosmetic
from elder_jax.run.results import make_report


def some_tokens(job: Job) -> np.ndarray:
  """One row of the run's own text; random tokens if it reads no text."""
  if job.windows:
    return next(iter(job.windows.values())).tokens_NT[:1, :128]
  if job.batches is not None:
    return job.batches.rows[np.arange(1)][:, :128]
  return np.random.default_rng(0).integers(0, job.source.spec.vocab_size, (1, 32), np.int32)


def export(run: Run) -> dict:
  """Writes run.pruned, checks it, and renames it to workdir/export. Returns verify's figures."""
  job = run.job
  work, report = job.config.path(), make_report(run)
  temporary, final, kept = work / 'export.partial', work / 'export', report['kept']
  log(f'writing and checking {final}')
  if job.source.is_gguf and not job.config.output.export_dtype:
    log(f'the export is in {job.source.dtype}; --export_dtype sets another type')
  hashes = _write(run, temporary, kept)
  figures = _check(run, temporary, kept)
  if why := figures.get('torch_error'):
    log(f'the export is complete, but it could not be checked in PyTorch: {why}')
  hosts.barrier('export checked')
  if hosts.is_leader():
    report |= {'verify': figures}
    write_json(temporary / lineage.NAME, {'lineage': report['lineage']})
    cosmetic(manifest.CARD, lambda: write_card(temporary, report, job.config.to_json()))
    manifest.write(temporary, hashes)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
  return figures


def _write(run: Run, folder: pathlib.Path, kept: list[int]) -> dict[str, str]:
  """Returns {file: sha256} of the files with tensors, in the leader."""
  job, hashes = run.job, {}
  output, source = job.config.output, job.source
  # A copy keeps the type of each tensor.
  dtype = output.export_dtype or ('' if job.copies else source.dtype)
  pieces_of = pieces_of_source(source, kept) if job.copies else pieces_of_model(run.pruned)
  if hosts.is_leader():
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shard_bytes = int(output.shard_gb * 1e9)
    hashes = save_model(pieces_of, source, kept, folder, dtype, shard_bytes, job.tokenizer_folder, output.text_only)
  elif not job.copies:
    take_part(pieces_of, source, kept)
  hosts.barrier('export written')
  return hashes


def _check(run: Run, folder: pathlib.Path, kept: list[int]) -> dict:
  job, tokens_BT = run.job, some_tokens(run.job)
  if job.copies:
    return verify.check_copy(folder, job.source.spec.with_layers(kept), len(kept), tokens_BT, job.torch)
  # This is the last use of the pruned model: its memory is needed for the one that is read back.
  pruned, run.pruned = run.pruned, None
  dtype = job.config.output.export_dtype or job.source.dtype
  return verify.check(folder, pruned, dtype, tokens_BT, job.torch, job.shardings, memory.free)
