"""`elder_jax verify FOLDER`: whether an exported folder holds the files that were written, and makes a model."""

import os

from elder_jax import errors
from elder_jax.commands.command import Command
from elder_jax.commands.command import fail
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import manifest
from elder_jax.hf.source import open_source


def run(parsed: Parsed):
  folder = user_path(parsed.operands[0])
  if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name too long
    raise InputError(f'{folder}: there is no such folder; check the path.')
  try:
    files = manifest.check(folder)
    source = open_source(str(folder), folder)
  except InputError as e:
    fail(errors.FAILED, e.for_command())
  print(f'{folder}: {files} files as written, {source.config["model_type"]}, {source.num_layers} layers')


COMMAND = Command(
  'verify',
  'Compare the files of an exported folder with its SHA256SUMS, and every tensor with its config.json.',
  run,
  operand='FOLDER',
  examples=('elder_jax verify runs/mine/export',),
)
