"""Folders of models and tokenizers, on disk or fetched from the hub; and the small files that an export copies."""

import fnmatch
import glob
import json
import os
import pathlib
import re
import shutil

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import safetensors_files

# Weights, archives, pictures. Of these, and of subfolders, only what is read is fetched.
_BIG = [
  f'*.{suffix}'
  for suffix in 'safetensors bin pt pth ckpt pkl pickle gguf ggml onnx onnx_data h5 msgpack npz npy ot tflite nemo '
  'tar gz tgz zip 7z zst parquet arrow pdf png jpg jpeg gif svg webp mp4'.split()
]
# Small files that are not copied: they describe the source's weights or its training, or are code that no export needs.
_NOT_COPIED = (
  '.* config.json readme* sha256sums *.index.json params.json *quant*config* recipe.y*ml mergekit* adapter_* modules.json '
  'trainer_* training_args* optimizer* scheduler* rng_state* latest checkpoint *_results.json results* eval* report.* '
  'elder_jax.json metrics.jsonl *.tfevents* *.log *.py *.pyc *.ipynb *.sh'
).split()
_OF_TOKENIZER = re.compile(
  r'tokeniz|.*(token|vocab|merges|sentencepiece|spiece|tekken)|.*\.(model|model\.v\d+|tiktoken|spm|bpe)$|chat_template|'
  r'additional_chat_templates/',
  re.IGNORECASE,
)
_LARGEST = 2**23  # bytes of a small file; a tokenizer's files may be larger
_TEMPLATES = 'additional_chat_templates'
_CONFIG = 'tokenizer_config.json'


def is_gguf(model: str) -> bool:
  """Whether --model names a GGUF file: it ends in .gguf and is not a folder."""
  path = user_path(model)
  return path.suffix.lower() == '.gguf' and not os.path.isdir(path)


def find(flag: str, name: str, what: str = 'model') -> pathlib.Path:
  """The folder that a setting names; a hub id is fetched first.

  Args:
    flag: the setting, for errors.
    name: its value: a path or a hub id.
    what: 'model', 'tokenizer', or 'config' to fetch config.json alone.

  Raises:
    InputError: there is no such folder, it cannot be fetched, or it holds no model.
  """
  path = user_path(name)
  if os.path.isfile(path):
    kind = 'is a file' if what == 'tokenizer' else 'is a file but not a .gguf'
    raise InputError(flag, name, f'{kind}; give the folder that holds it.')
  if not os.path.isdir(path):
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', name) or name.startswith(('.', '/')):
      raise InputError(flag, name, 'there is no such folder; check the path, or give a hub id (owner/name).')
    path = _fetch(flag, name, what)
  if what == 'model' and (path / 'adapter_config.json').is_file() and not any(path.glob('model*.safetensors')):
    raise InputError(
      flag,
      name,
      'is a LoRA adapter, not a model; merge it into its base model (merge_and_unload of peft) and give '
      'the merged folder.',
    )
  if what != 'tokenizer' and not (path / 'config.json').is_file():
    files = 'is empty' if path.is_dir() and not any(path.iterdir()) else 'has no config.json'
    raise InputError(flag, name, f'the folder {files}; give a folder in Hugging Face format, or a .gguf file.')
  return path


def _fetch(flag: str, hub_id: str, what: str) -> pathlib.Path:
  import huggingface_hub  # imported here: a run on local files does not need it

  def fetch(**which) -> pathlib.Path:
    return pathlib.Path(huggingface_hub.snapshot_download(hub_id, **which))

  try:
    if what == 'config':
      return fetch(allow_patterns=['config.json'])
    folder = fetch(ignore_patterns=[*_BIG, '*/*'])
    more = _weights(folder) if what == 'model' else [_CONFIG]
    # The same commit, even if another one is pushed in between.
    return fetch(allow_patterns=[f'{_TEMPLATES}/*', *more], revision=folder.name)
  except InputError:
    raise
  except huggingface_hub.errors.GatedRepoError as e:
    raise InputError(flag, hub_id, 'is gated on the hub; accept its terms there and run hf auth login.') from e
  except huggingface_hub.errors.RepositoryNotFoundError as e:
    raise InputError(
      flag,
      hub_id,
      'no such folder here, and no such repository on the hub; check the name, or run hf auth login if it is private.',
    ) from e
  except Exception as e:  # the hub client raises many other kinds  # noqa: BLE001
    raise InputError(
      flag,
      hub_id,
      f'no such folder here, and fetching it from the hub failed ({reason(e)}); check the name or give a folder.',
    ) from e


def _weights(folder: pathlib.Path) -> list[str]:
  """Patterns of the files that open_folder reads: those named by the index, or the single file."""
  index = folder / 'model.safetensors.index.json'
  if not index.is_file():
    return ['model.safetensors']
  weight_map = safetensors_files.read_json(index).get('weight_map')
  names = weight_map.values() if isinstance(weight_map, dict) else ()
  return sorted({glob.escape(name) for name in names if isinstance(name, str)})


def small_files(folder: pathlib.Path, tokenizer: pathlib.Path | None = None) -> dict[str, pathlib.Path]:
  """{name: path} of the files that an export copies: every small file of the source that also holds for the pruned model.

  Names that do not print or hold a backslash are skipped: SHA256SUMS cannot list them.

  Args:
    tokenizer: the folder of --tokenizer; its tokenizer files replace the source's.

  Raises:
    InputError: a file cannot be read, or `tokenizer` holds no tokenizer.
  """
  found = _copied(folder)
  if tokenizer is not None:
    theirs = {name: path for name, path in _copied(tokenizer).items() if _OF_TOKENIZER.match(name)}
    if not theirs:
      raise InputError('tokenizer', tokenizer, 'the folder holds no tokenizer; give one that does.')
    found = {name: path for name, path in found.items() if not _OF_TOKENIZER.match(name)} | theirs
  if _CONFIG in found and (code := _code(found[_CONFIG])):
    scripts = {path.name: path for path in found[_CONFIG].parent.glob('*.py')}
    found |= scripts if code <= scripts.keys() else {}
  for path in found.values():
    try:
      path.open('rb').close()
    except OSError as e:
      raise InputError(
        f'{path}: the export copies this file, but it cannot be read ({e.strerror}); repair or remove it.'
      ) from e
  return found


def copy(files: dict[str, pathlib.Path], folder: pathlib.Path):
  """Copies `files` into `folder`, byte for byte. A tokenizer's auto_map is deleted if its code is not among them."""
  for name, path in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    if name == _CONFIG and not _code(path) <= files.keys():
      config = safetensors_files.read_json(path)
      del config['auto_map']
      (folder / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    else:
      shutil.copyfile(path, folder / name)


def _copied(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  paths = sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob('*.jinja')])
  return {str(path.relative_to(folder).as_posix()): path for path in paths if _is_copied(path)}


def _is_copied(path: pathlib.Path) -> bool:
  name = path.name
  if not name.isprintable() or '\\' in name:
    return False
  if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in [*_BIG, *_NOT_COPIED]):
    return False
  if not os.path.isfile(path):
    return os.path.islink(path) and not os.path.exists(path)  # a broken link: small_files reports it
  return os.path.getsize(path) <= _LARGEST or bool(_OF_TOKENIZER.match(name))


def _code(config: pathlib.Path) -> set[str]:
  """The Python files that the auto_map of a tokenizer_config.json names."""
  try:
    named = json.loads(config.read_text(encoding='utf-8')).get('auto_map')
  except (OSError, ValueError, AttributeError):  # reported where the tokenizer is loaded
    return set()
  names = re.findall(r'"([^"]*)"', json.dumps(list(named.values()) if isinstance(named, dict) else named))
  return {f'{name.split(".")[0]}.py' for name in names if '--' not in name}
