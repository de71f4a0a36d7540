"""`elder_jax verify FOLDER`: check the files of an exported folder."""

import os
import pathlib

from elder_jax import errors
from elder_jax import extras
from elder_jax.commands.command import Command
from elder_jax.commands.command import fail
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import manifest
from elder_jax.hf.by_name import folder as by_name
from elder_jax.hf.source import architecture
from elder_jax.hf.source import open_source
from elder_jax.hf.source import read_config


def run(parsed: Parsed):
  folder = user_path(parsed.operands[0])
  if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name too long
    raise InputError(f'{folder}: there is no such folder; check the path.')
  try:
    files = manifest.check(folder, note=print)
    kind, layers = _open(folder)
  except InputError as e:
    fail(errors.FAILED, e.for_command())
  print(f'{folder}: {files} files as written, {kind}, {layers} layers')


def _open(folder: pathlib.Path) -> tuple[str, int]:
  """(architecture, number of layers), after the headers of all tensors were read."""
  if found := sorted(folder.glob('*.gguf')):
    extras.require('gguf', f'{found[0]}: a .gguf file')
    from elder_jax.hf.gguf.cut import open_file  # not at the top: it needs the package gguf

    opened = open_file(found[0])
    return opened.architecture, opened.depth
  config = read_config(str(folder))
  try:
    known = not isinstance(config.get('quantization_config'), dict) and bool(architecture(str(folder), config))
  except InputError:
    known = False
  if known:
    source = open_source(str(folder), folder)
    return source.config['model_type'], source.num_layers
  checkpoint = by_name.open_checkpoint(str(folder))
  return str(checkpoint.config.get('model_type')), checkpoint.layers.depth


COMMAND = Command(
  'verify',
  'Compare the files of an exported folder with its SHA256SUMS, and every tensor with its config.json.',
  run,
  operand='FOLDER',
  examples=('elder_jax verify runs/mine/export',),
)
