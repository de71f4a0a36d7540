"""Checks at the start of a run for what would fail much later: the export, and distillation of hidden states."""

import shutil

import jax.numpy as jnp

from elder_jax.errors import InputError
from elder_jax.hf import multimodal
from elder_jax.hf import verify
from elder_jax.hf.save import config_of
from elder_jax.hf.source import Source
from elder_jax.hf.source import architecture
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import log
from elder_jax.model import pruning
from elder_jax.run import lineage
from elder_jax.run.config import Config


def check_export(config: Config, source: Source, num_remove: int):
  """Raises InputError if the export could not be read back, or if the disk has no room for it."""
  kept = list(range(source.num_layers - num_remove))
  spec = source.spec.with_layers(kept)
  output = config.output
  if output.text_only and source.whole is None:
    raise InputError('text_only', True, f'{config.paths.model} is a text-only model already; leave the flag out.')
  written = config_of(source, kept, output.export_dtype, output.text_only)
  if architecture(config.paths.model, multimodal.language_config(written)) != (spec, len(kept)):
    raise InputError(
      'model',
      config.paths.model,
      f'its config.json cannot be cut to {len(kept)} layers; please report this and attach the file.',
    )
  params = pruning.num_params(abstract_decoder(spec, len(kept)))
  needed = params * jnp.dtype(output.export_dtype or source.dtype).itemsize
  needed += source.whole.num_bytes if source.whole and not output.text_only else 0
  if (free := shutil.disk_usage(config.path()).free) < needed:
    raise InputError(
      'workdir',
      config.paths.workdir,
      f'the export needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; free some space or choose '
      'another folder.',
    )


def check_streams(config: Config, source: Source, teacher: Source):
  """Raises InputError if --distill_hidden cannot compare the residual streams of the model and of --teacher."""
  weight = config.training.distill_hidden
  if not weight or not any(map(config.trains, config.recipes())):
    return
  if source.spec.d_model != teacher.spec.d_model:
    raise InputError(
      'distill_hidden',
      weight,
      f'needs residual streams of the same width, but the model has {source.spec.d_model} and --teacher has '
      f'{teacher.spec.d_model}; leave it out and use --distill.',
    )
  if lineage.kept_layers(config, source, teacher) is None:
    raise InputError(
      'distill_hidden',
      weight,
      f"it is not known which of the {teacher.num_layers} layers of --teacher the model's {source.num_layers} layers "
      'are; give --kept_layers, or leave it out and use --distill.',
    )


def checks_in_torch(config: Config, source: Source, num_remove: int) -> bool:
  """Whether the export is checked in PyTorch. Tries first if transformers accepts its config.json.

  Raises:
    InputError: with --verify=torch, if transformers does not.
  """
  kept = list(range(source.num_layers - num_remove))
  params = pruning.num_params(abstract_decoder(source.spec.with_layers(kept), len(kept)))
  if not verify.use_torch(config.output.verify, params):
    return False
  output = config.output
  why = verify.why_torch_cannot(config_of(source, kept, output.export_dtype, output.text_only))
  if why and config.output.verify == 'torch':
    raise InputError('verify', 'torch', f'transformers cannot build the pruned model ({why}); use --verify=jax.')
  if why:
    log(f'skipping the check in PyTorch: transformers cannot build the pruned model ({why})')
  return not why
