"""`elder_jax export-gguf FOLDER`: writes an exported folder as a GGUF file for llama.cpp and Ollama."""

import dataclasses
import os
import pathlib
import tempfile

from elder_jax import extras
from elder_jax.commands.command import Command
from elder_jax.commands.command import out_file
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import folder as model_folder
from elder_jax.hf import gguf
from elder_jax.hf.source import open_source
from elder_jax.log import Progress
from elder_jax.log import in_megabytes
from elder_jax.run import lineage
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class GgufSettings(Settings):
  """The GGUF file to write."""

  like: str = setting(
    '', 'A .gguf file of the original model. It provides the metadata, the tokenizer, and the types of --type=source.'
  )
  out: str = setting('', 'The file to write.')
  type: str = setting(
    gguf.LIKE,
    'Type of the matrices. source: the type in --like, or Q8_0 if that cannot be written. Unchanged tensors are copied '
    'byte for byte.',
    choices=gguf.CHOICES,
  )


def run(parsed: Parsed):
  settings = GgufSettings(**parsed.settings)
  for name in ('like', 'out'):
    if not getattr(settings, name):
      raise InputError(name, '', 'is missing; give the path of a .gguf file.')
  extras.require('gguf', 'a .gguf file', 'like', settings.like)
  from elder_jax.hf.gguf import cut  # not at the top: they need the package gguf
  from elder_jax.hf.gguf import export

  like, out = user_path(settings.like), out_file(settings.out)
  if not os.path.isfile(like):
    raise InputError('like', settings.like, 'there is no such file; check the path.')
  assert out is not None
  if out.exists() and out.samefile(like):
    raise InputError('out', settings.out, 'is --like itself; give another path.')
  model = parsed.operands[0]
  if model_folder.is_gguf(model):
    raise InputError(
      'model', model, 'is a .gguf file already; cut its layers with elder_jax prune --export_format=gguf.'
    )
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(model, pathlib.Path(scratch))
    depth = cut.open_file(like).depth
    kept = lineage.kept_by(lineage.of_folder(source.files), depth)
    if kept is None or len(kept) != source.num_layers:
      kept = list(range(depth)) if depth == source.num_layers else None
    partial = out.with_name(f'{out.name}.partial')
    try:
      made = export.export(source, like, kept, settings.type, partial, in_megabytes(Progress('writing, MB')))
      os.replace(partial, out)
    finally:
      partial.unlink(missing_ok=True)
  kinds = ', '.join(f'{count} {kind}' for kind, count in made.kinds.items())
  print(f'{out}: {source.num_layers} layers, {out.stat().st_size / 1e6:.0f} MB, tensors: {kinds}')
  if settings.type == gguf.LIKE:
    print(f'{made.untouched} tensors copied from --like, byte for byte')
  if made.replaced:
    print(f'wrote Q8_0 instead of {", ".join(made.replaced)}; use llama-quantize for these types')


COMMAND = Command(
  'export-gguf',
  'Write an exported folder as a GGUF file for llama.cpp and Ollama.',
  run,
  {'File': GgufSettings},
  ('elder_jax export-gguf runs/mine/export --like=original.gguf --out=mine.gguf --type=q8_0',),
  operand='FOLDER',
)
