"""How to run an exported model: the commands of its model card."""

import pathlib
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
_CONVERT = 'python convert_hf_to_gguf.py FOLDER --outfile model.gguf'
_EXPORT = 'elder_jax export-gguf FOLDER --like=ORIGINAL.gguf --out=model.gguf'
_GENERATE = (
  'output = model.generate(**inputs, max_new_tokens=40)',
  'print(tokenizer.decode(output[0], skip_special_tokens=True))',
)


class Files(NamedTuple):
  """An exported folder, as far as its card depends on it."""

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


def section(files: Files) -> list[str]:
  """Lines of Markdown."""
  if files.gguf:
    return ['## Use it', '', *_of_gguf(files.gguf, files.chat)]
  code = ['The code of this architecture is not included: add the Python files of the original.', '']
  return [
    '## Use it',
    '',
    'FOLDER is this folder, or the name of this model on the hub.',
    '',
    *(code if _code(files) else []),
    '### transformers',
    '',
    *_block('python', _transformers(files)),
    '',
    '### vLLM',
    '',
    *_vllm(files),
    '',
    *_by_gguf(files),
  ]


def _vllm(files: Files) -> list[str]:
  if files.config.get('model_type') == 'gpt_oss' and _why_not_converted(files.config):
    return [_NOT_IN_VLLM]
  return _block('sh', [f'vllm serve FOLDER{" --trust-remote-code" if _code(files) else ""}'])


def _by_gguf(files: Files) -> list[str]:
  """How a folder becomes a GGUF file, and how that is run."""
  why_not = _why_not_converted(files.config)
  family = FAMILIES.get(str(multimodal.language_config(files.config).get('model_type')))
  ours = not _has_pictures(files.config) and hasattr(family, 'GGUF_ARCHITECTURE')
  if why_not and not ours:
    return ['### llama.cpp and Ollama', '', why_not]
  commands = [] if why_not else ['# The script is in the repository of llama.cpp.', _CONVERT]
  commands += ['# With a GGUF file of the original:', _EXPORT] if ours else []
  return [
    '### A GGUF file',
    '',
    *([why_not, ''] if why_not else []),
    *_block('sh', commands),
    '',
    *_of_gguf('model.gguf', files.chat),
  ]


def _transformers(files: Files) -> list[str]:
  code = ', trust_remote_code=True' if _code(files) else ''
  pictures = _has_pictures(files.config)
  auto = 'AutoModelForImageTextToText' if pictures else 'AutoModelForCausalLM'
  lines = [
    f'from transformers import {auto}, AutoTokenizer',
    '',
    f"model = {auto}.from_pretrained('FOLDER', dtype='auto'{code})",
    f"tokenizer = AutoTokenizer.from_pretrained('FOLDER'{code})",
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


def _of_gguf(file: str, chat: bool) -> list[str]:
  run = f'llama-cli -m {file}' if chat else f"llama-completion -m {file} -no-cnv -n 40 -p '{PROMPT}'"
  ollama = [f"echo 'FROM ./{file}' > Modelfile", 'ollama create my-model -f Modelfile', 'ollama run my-model']
  template = 'Ollama uses the chat template of the file if it recognises it; else add a `TEMPLATE` to the Modelfile.'
  return [
    '### llama.cpp',
    '',
    *_block('sh', [run, f'llama-server -m {file}  # an OpenAI-compatible server on port 8080']),
    '',
    '### Ollama',
    '',
    *_block('sh', ollama),
    *(['', template] if chat else []),
  ]


def _block(language: str, lines: list[str]) -> list[str]:
  return [f'```{language}', *lines, '```']


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
