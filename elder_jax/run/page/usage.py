"""How to run the exported model, with the commands of this run's folder."""

import pathlib
import re
import shlex
from xml.etree.ElementTree import Element

from elder_jax.run.page.data import SPEED
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import section


def usage(run: Finished) -> Element:
  """A section: transformers, vLLM, llama.cpp and Ollama, or the last two alone if the export is a GGUF file."""
  ways = _of_file(run) if run.gguf else _of_folder(run)
  parts = []
  for title, code in ways:
    parts.append(element('div', None, element('h3', None, title), _code(code, title)))
  return section('Use it', element('div', {'class': 'ways'}, *parts))


def _code(code: str, title: str) -> Element:
  return element('pre', {'tabindex': '0', 'role': 'region', 'aria-label': title}, element('code', None, code))


def _name(run: Finished) -> str:
  """A short name for files and for Ollama."""
  name = pathlib.PurePath(run.report['model']).name.removesuffix('.gguf')
  return re.sub(r'[^\w.-]', '-', f'{name}-{len(run.report["kept"])}-layers', flags=re.ASCII).lower()


def _of_folder(run: Finished) -> list[tuple[str, str]]:
  folder, name, model = shlex.quote(run.export), _name(run), run.report['model']
  if model.endswith('.gguf'):
    convert = f'elder_jax export-gguf {folder} \\\n  --like={shlex.quote(model)} \\\n  --out={name}.gguf'
  else:
    convert = f'python convert_hf_to_gguf.py {folder} \\\n  --outfile {name}.gguf'
  transformers = (
    'from transformers import pipeline\n'
    f'model = pipeline("text-generation", {run.export!r})\n'
    'print(model("The capital of France is"))'
  )
  dense = (run.report.get('teacher') or {}).get('model') or model
  out = shlex.quote('/'.join((run.name.rstrip('/'), SPEED)))
  speed = (
    f'elder_jax speed --pruned={folder} \\\n  --model={shlex.quote(dense)} \\\n  --out={out}\n'
    f'elder_jax report {shlex.quote(run.name)}'
  )
  return [
    ('transformers', transformers),
    ('vLLM', f'vllm serve {folder}'),
    ('llama.cpp', f'{convert}\nllama-cli -m {name}.gguf \\\n  -p "The capital of France is"'),
    ('Ollama, with that file', _ollama(f'./{name}.gguf', name)),
    ('elder_jax', f'elder_jax generate --model={folder} \\\n  --prompt="The capital of France is"'),
    ('Measure the speed-up for this page', speed),
  ]


def _of_file(run: Finished) -> list[tuple[str, str]]:
  return [
    ('llama.cpp', f'llama-cli -m {shlex.quote(run.export)} -p "The capital of France is"'),
    ('Ollama', _ollama(run.export, _name(run))),
  ]


def _ollama(file: str, name: str) -> str:
  line = shlex.quote(f'FROM {file}')
  return f'echo {line} > Modelfile\nollama create {name} -f Modelfile\nollama run {name}'
