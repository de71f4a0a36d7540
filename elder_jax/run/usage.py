"""How to run an exported model: the commands of its model card and of its report."""

import pathlib
import shlex
from typing import NamedTuple

from elder_jax.errors import InputError
from elder_jax.hf import gguf
from elder_jax.hf import multimodal
from elder_jax.hf import safetensors_files
from elder_jax.hf.families import FAMILIES

PROMPT, QUESTION = 'The capital of France is', 'What is the capital of France?'
# Families with two kinds of layers, of which llama.cpp of October 2026 assumes that every n-th is of the second kind: its
# converter does not write which ones are. For OLMo 3 and EXAONE 4 it does.
PERIODS = {'gemma2': 2, 'gemma3_text': 6, 'cohere2': 4, 'gpt_oss': 2, 'smollm3': 4, 'qwen3_5_text': 4}
_WRITTEN = ('olmo3', 'exaone4')
_NOT_CONVERTED = ('opt',)
_OTHER_MODEL = (
  'Do not use convert_hf_to_gguf.py of llama.cpp: the remaining layers do not alternate as in the original, and it does '
  'not write which layer is of which kind. The file would be another model.'
)
_NOT_IN_VLLM = (
  "vLLM's own gpt-oss gives a window to every layer with an even number. In this model other layers have one: use "
  'transformers.'
)
_UNCHECKED = (
  'This model has several kinds of layers. Whether convert_hf_to_gguf.py of llama.cpp writes which layer is of which kind '
  'was not checked: compare the outputs before you use such a file.'
)
_GENERATE = (
  'output = model.generate(**inputs, max_new_tokens=40)',
  'print(tokenizer.decode(output[0], skip_special_tokens=True))',
)


class Files(NamedTuple):
  """An exported folder, as far as its commands depend on it."""

  config: dict  # config.json; empty of a GGUF file
  chat: bool  # there is a chat template
  gguf: str  # name of the GGUF file; empty of a Hugging Face folder
  sizes: dict[str, int]  # {type: bytes of the tensors of this type}


NOTHING = Files({}, False, '', {})


def files_of(folder: pathlib.Path) -> Files:
  """Reads config.json and the headers of the weights."""
  sizes: dict[str, int] = {}
  if found := sorted(folder.glob('*.gguf')):
    from elder_jax.hf.gguf.source import read_raw  # not at the top: it needs the package gguf

    fields, _, tensors = read_raw(found[0])
    for tensor in tensors:
      sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + tensor.data.nbytes
    return Files({}, 'tokenizer.chat_template' in fields, found[0].name, sizes)
  for _, header in safetensors_files.headers(folder).values():
    for about in header.values():
      begin, end = about['data_offsets']
      sizes[about['dtype']] = sizes.get(about['dtype'], 0) + end - begin
  return Files(safetensors_files.read_json(folder / 'config.json'), _has_chat_template(folder), '', sizes)


def _has_chat_template(folder: pathlib.Path) -> bool:
  if (folder / 'chat_template.jinja').is_file():
    return True
  try:
    return bool(safetensors_files.read_json(folder / 'tokenizer_config.json').get('chat_template'))
  except InputError:  # there is none
    return False


def pipeline_tag(files: Files) -> str:
  """The task of the hub."""
  return 'image-text-to-text' if _has_pictures(files.config) else 'text-generation'


class Names(NamedTuple):
  """What the commands call things."""

  folder: str = 'FOLDER'  # the export
  gguf: str = 'model.gguf'  # the export as a GGUF file
  original: str = 'ORIGINAL.gguf'  # a GGUF file of the original
  ollama: str = 'my-model'


class Way(NamedTuple):
  """A runtime and its commands."""

  title: str
  lines: list[str]
  language: str = 'sh'
  before: str = ''  # a sentence
  after: str = ''  # a sentence


def section(files: Files) -> list[str]:
  """Lines of Markdown."""
  lines = ['## Use it', '']
  if not files.gguf:
    lines += ['FOLDER is this folder, or the name of this model on the hub.', '']
    lines += ['The code of this architecture is not included: add the Python files of the original.', ''] * _code(files)
  for way in ways(files, Names(gguf=files.gguf or Names().gguf)):
    block = [f'```{way.language}', *way.lines, '```', ''] if way.lines else []
    lines += [f'### {way.title}', '', *([way.before, ''] if way.before else []), *block]
    lines += [way.after, ''] if way.after else []
  return lines[:-1]


def ways(files: Files, names: Names) -> list[Way]:
  """How to run the export: transformers, vLLM, llama.cpp and Ollama, or the last two alone if it is a GGUF file."""
  if files.gguf:
    return _of_gguf(names, files.chat)
  return [
    Way('transformers', _transformers(files, names.folder), 'python'),
    _vllm(files, names),
    *_by_gguf(files, names),
  ]


def _vllm(files: Files, names: Names) -> Way:
  if files.config.get('model_type') == 'gpt_oss' and _why_not_converted(files.config):
    return Way('vLLM', [], before=_NOT_IN_VLLM)
  return Way('vLLM', [f'vllm serve {shlex.quote(names.folder)}{" --trust-remote-code" if _code(files) else ""}'])


def _by_gguf(files: Files, names: Names) -> list[Way]:
  """How a folder becomes a GGUF file, and how that is run."""
  why_not = _why_not_converted(files.config)
  family = FAMILIES.get(str(multimodal.language_config(files.config).get('model_type')))
  ours = not _has_pictures(files.config) and hasattr(family, 'GGUF_ARCHITECTURE')
  if why_not and not ours:
    return [Way('llama.cpp and Ollama', [], before=why_not)]
  folder, original, made = map(shlex.quote, (names.folder, names.original, names.gguf))
  convert = f'python convert_hf_to_gguf.py {folder} --outfile {made}'
  export = f'elder_jax export-gguf {folder} --like={original} --out={made}'
  commands = [] if why_not else ['# The script is in the repository of llama.cpp.', convert]
  commands += ['# With a GGUF file of the original:', export] if ours else []
  return [Way('A GGUF file', commands, before=why_not), *_of_gguf(names, files.chat)]


def _transformers(files: Files, folder: str) -> list[str]:
  code = ', trust_remote_code=True' if _code(files) else ''
  pictures = _has_pictures(files.config)
  auto = 'AutoModelForImageTextToText' if pictures else 'AutoModelForCausalLM'
  lines = [
    f'from transformers import {auto}, AutoTokenizer',
    '',
    f"model = {auto}.from_pretrained({folder!r}, dtype='auto'{code})",
    f'tokenizer = AutoTokenizer.from_pretrained({folder!r}{code})',
  ]
  if files.chat:
    lines += [
      f"messages = [{{'role': 'user', 'content': '{QUESTION}'}}]",
      'inputs = tokenizer.apply_chat_template(',
      *('  messages,', '  add_generation_prompt=True,', '  return_dict=True,', "  return_tensors='pt',"),
      ')',
    ]
  else:
    lines.append(f"inputs = tokenizer('{PROMPT}', return_tensors='pt')")
  return [*lines, *_GENERATE]


def _of_gguf(names: Names, chat: bool) -> list[Way]:
  file = shlex.quote(names.gguf)
  run = f'llama-cli -m {file}' if chat else f"llama-completion -m {file} -no-cnv -n 40 -p '{PROMPT}'"
  source = shlex.quote(f'FROM {names.gguf if names.gguf.startswith(("/", "~")) else f"./{names.gguf}"}')
  ollama = [f'echo {source} > Modelfile', f'ollama create {names.ollama} -f Modelfile', f'ollama run {names.ollama}']
  template = 'Ollama uses the chat template of the file if it recognises it; else add a `TEMPLATE` to the Modelfile.'
  return [
    Way('llama.cpp', [run, f'llama-server -m {file}  # an OpenAI-compatible server on port 8080']),
    Way('Ollama', ollama, after=template if chat else ''),
  ]


def _has_pictures(config: dict) -> bool:
  return multimodal.is_multimodal(config) or ('vision_config' in config and 'text_config' in config)


def _code(files: Files) -> bool:
  return 'auto_map' in files.config


def _why_not_converted(config: dict) -> str:
  """Why llama.cpp's converter fails, or makes a file of another model; empty where it does neither."""
  language = multimodal.language_config(config)
  kind = str(language.get('model_type'))
  kinds = language.get('no_rope_layers') or language.get('layer_types')
  if kind in _NOT_CONVERTED:
    return 'convert_hf_to_gguf.py of llama.cpp does not know this architecture.'
  if kind in _WRITTEN or not isinstance(kinds, list):
    return ''
  if period := PERIODS.get(kind):
    regular = [k not in ('full_attention', 0) for k in kinds] == gguf.default_pattern(period, len(kinds))
    return '' if regular else _OTHER_MODEL
  return _UNCHECKED if len({str(k) for k in kinds}) > 1 else ''
