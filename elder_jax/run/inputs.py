"""What a run read, remembered by content: a run that is resumed after its text or model changed is refused."""

import hashlib
import json
import os
import pathlib

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import safetensors_files
from elder_jax.hf.gguf import source as gguf_source
from elder_jax.hf.source import Source

_SAMPLES, _SAMPLE = 64, 2**20  # of a large file: pieces, bytes of each


def named(setting: str, source: str) -> str:
  """The key of an input: its setting and where it lies, however that was written."""
  path = user_path(source)
  return f'{setting}={path.resolve() if path.exists() else source}'


def of_model(source: Source) -> str:
  """That of the weights and of what says how to read them."""
  if source.is_gguf:
    return of_files(gguf_source.parts_of(user_path(source.name)))
  names = {'config.json', 'model.safetensors', 'model.safetensors.index.json'}
  index = source.files / 'model.safetensors.index.json'
  if index.is_file() and not (source.files / 'model.safetensors').is_file():
    names |= set(safetensors_files.read_json(index)['weight_map'].values())
  return of_files([path for name in names if (path := source.files / name).is_file()])


def of_files(paths: list[pathlib.Path]) -> str:
  """sha256 over names, sizes and content; of a file of more than 64 MiB over pieces of it, its header among them.

  A copy of a model, or one that was fetched again, is the same model: times do not count.
  """
  digest = hashlib.sha256()
  for path in sorted(paths):
    size = path.stat().st_size
    digest.update(f'{path.name} {size}\n'.encode())
    with path.open('rb') as file:
      if size <= _SAMPLES * _SAMPLE:
        digest.update(file.read())
        continue
      for i in range(_SAMPLES):
        file.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE))
  return digest.hexdigest()


def of_tokenizer(tokenizer) -> str:
  """sha256 of the vocabulary and of the rules by which text is cut."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
  ids = tokenizer.bos_token_id, tokenizer.eos_token_id
  return hashlib.sha256(f'{ids}{rules}'.encode()).hexdigest()


def of_tasks(loaded, tasks_dir: str) -> str:
  """sha256 of the questions of the harness's tasks and of local task files."""
  digest = hashlib.sha256()
  for name, task in sorted(loaded['tasks'].items()):
    digest.update(name.encode())
    for question in task.eval_docs:
      digest.update(json.dumps(question, sort_keys=True, default=str).encode())
  folder = user_path(tasks_dir) if tasks_dir else None
  files = [p for p in folder.rglob('*') if p.suffix in ('.yaml', '.yml', '.py') and p.is_file()] if folder else []
  digest.update(of_files(files).encode())
  return digest.hexdigest()


def check(work: pathlib.Path, inputs: dict[str, str]):
  """Raises InputError for an input that is not the one that the run in this folder began with."""
  try:
    before = json.loads((work / 'inputs.json').read_text(encoding='utf-8'))
    before = {name.removeprefix('--'): sha256 for name, sha256 in before.items()}  # earlier versions had the dashes
  except (OSError, ValueError):  # a new run, or one that was killed before it had claimed the folder
    return
  for name, sha256 in inputs.items():
    if before.get(name, sha256) != sha256:
      setting, _, value = name.rpartition('=')
      raise InputError(
        setting,
        value,
        f'is not what the run in {os.fspath(work)} began with (sha256 {sha256[:12]}…, then {before[name][:12]}…); put the '
        'old content back, or choose another --workdir.',
      )
