"""The sha256 of everything that a run reads. A run is not resumed after its text or model has changed."""

import hashlib
import json
import os
import pathlib

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import safetensors_files
from elder_jax.hf.source import Source
from elder_jax.text.identity import of_files


def named(setting: str, source: str) -> str:
  """Returns the key of an input: its setting and its resolved path."""
  path = user_path(source)
  return f'{setting}={path.resolve() if path.exists() else source}'


def of_model(source: Source) -> str:
  """The sha256 of a model: its weights, config.json and index."""
  if source.is_gguf:
    from elder_jax.hf.gguf.source import parts_of  # here: it needs the package gguf

    return of_files(parts_of(user_path(source.name)))
  return of_folder(source.files)


def of_folder(folder: pathlib.Path) -> str:
  """The sha256 of a Hugging Face folder: its weights, config.json and index."""
  names = {'config.json', 'model.safetensors', 'model.safetensors.index.json'}
  index = folder / 'model.safetensors.index.json'
  if index.is_file() and not (folder / 'model.safetensors').is_file():
    names |= set(safetensors_files.read_json(index)['weight_map'].values())
  return of_files([path for name in names if (path := folder / name).is_file()])


def of_tasks(loaded, tasks_dir: str) -> str:
  """The sha256 of the questions of the harness's tasks and of local task files."""
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
  """Raises InputError for an input that has changed since the run in this folder started."""
  try:
    before = json.loads((work / 'inputs.json').read_text(encoding='utf-8'))
    before = {name.removeprefix('--'): sha256 for name, sha256 in before.items()}  # earlier versions wrote dashes
  except (OSError, ValueError):  # a new run, or one that was killed before it claimed the folder
    return
  for name, sha256 in inputs.items():
    if before.get(name, sha256) != sha256:
      setting, _, value = name.rpartition('=')
      raise InputError(
        setting,
        value,
        f'has changed since the run in {os.fspath(work)} started (sha256 {before[name][:12]}… then, {sha256[:12]}… now); '
        'restore the old content, or choose another --workdir.',
      )
