"""How to run the exported model, with the commands of this run's folder."""

import pathlib
import re
import shlex
from xml.etree.ElementTree import Element

from elder_jax.run.page.data import SPEED
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import section
from elder_jax.run.usage import PROMPT
from elder_jax.run.usage import Names
from elder_jax.run.usage import Way
from elder_jax.run.usage import ways


def usage(run: Finished) -> Element:
  """A section: the ways of the model card, then elder_jax itself."""
  found = [*ways(run.files, _names(run)), *([] if run.files.gguf else _own(run))]
  return section('Use it', element('div', {'class': 'ways'}, *map(_shown, found)))


def _shown(way: Way) -> Element:
  sentences = [element('p', None, text.replace('`', '')) if text else None for text in (way.before, way.after)]
  code = element('code', None, '\n'.join(way.lines))
  block = element('pre', {'tabindex': '0', 'role': 'region', 'aria-label': way.title}, code) if way.lines else None
  return element('div', None, element('h3', None, way.title), sentences[0], block, sentences[1])


def _names(run: Finished) -> Names:
  model = run.report['model']
  short = pathlib.PurePath(model).name.removesuffix('.gguf')
  name = re.sub(r'[^\w.-]', '-', f'{short}-{len(run.report["kept"])}-layers', flags=re.ASCII).lower()
  original = model if model.endswith('.gguf') else Names().original
  return Names(run.export, run.export if run.files.gguf else f'{name}.gguf', original, name)


def _own(run: Finished) -> list[Way]:
  folder = shlex.quote(run.export)
  dense = (run.report.get('teacher') or {}).get('model') or run.report['model']
  out = shlex.quote('/'.join((run.name.rstrip('/'), SPEED)))
  speed = f'elder_jax speed --pruned={folder} --model={shlex.quote(dense)} --out={out}'
  return [
    Way('elder_jax', [f'elder_jax generate --model={folder} --prompt="{PROMPT}"']),
    Way('Measure the speed-up for this page', [speed, f'elder_jax report {shlex.quote(run.name)}']),
  ]
