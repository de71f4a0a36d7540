"""The tables of docs/errors.md: every sentence of bad input in elder_jax/, with its fix, read from the source."""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[1] / 'elder_jax'
HOLE = '…'  # in place of what a message is filled with
# Heading -> beginnings of the paths of the modules that raise; the first that fits counts.
GROUPS = {
  'Commands': ('commands/', 'extras'),
  'How many layers, methods and recipes': ('methods/', 'recipes/', 'entries', 'run/how_much', 'run/removal_settings'),
  'Training text, evaluation text and tokenizers': ('text/', 'run/by_', 'hf/gguf/tokenizer'),
  'Training': ('training/', 'model/', 'run/row_training', 'run/healing'),
  'Devices and processes': ('devices/', 'run/plan/'),
  'config.json': ('hf/families/',),
  'GGUF files': ('hf/gguf/',),
  'Models cut by the names of their tensors': ('hf/by_name/', 'hf/cut', 'hf/copies'),
  'Checkpoint folders and tensors': ('hf/',),
  'Settings and work folder of a run': ('run/', 'settings'),
  'The library': ('api',),
}


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A message.

  setting: the flag that it is about, without dashes; empty: none, or one that differs.
  text: with HOLE where it is filled.
  """

  module: str
  setting: str
  text: str

  @property
  def parts(self) -> tuple[str, str]:
    """(what is wrong, the fix)."""
    wrong, _, fix = self.text.rstrip('.').rpartition('; ')
    return (wrong, fix) if wrong else (fix, '')

  def matches(self, message: str) -> bool:
    pattern = '.*'.join(re.escape(part) for part in self.text.split(HOLE))
    return re.search(pattern, message) is not None


@functools.cache
def sentences() -> tuple[Sentence, ...]:
  found: dict[tuple[str, str], Sentence] = {}
  for path in sorted(PACKAGE.rglob('*.py')):
    module = path.relative_to(PACKAGE).with_suffix('').as_posix()
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for setting, text in [*_raised(tree), *_returned(tree)]:
      if len(re.findall(r'[a-z]{2,}', text)) >= 3:  # else all of it is filled in
        found.setdefault((setting, text), Sentence(module, setting, text))
  return tuple(found.values())


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """(setting, sentence) of each InputError."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('InputError') and node.args:
      first = node.args[0]
      setting = first.value if len(node.args) == 3 and isinstance(first, ast.Constant) else ''
      for text in _texts(node.args[-1]):
        yield str(setting), text


def _returned(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """Sentences that functions return for another to raise, as `why_not` does."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Return) and node.value is not None:
      for text in _texts(node.value):
        if '; ' in text and text.endswith('.'):
          yield '', text


def _texts(node: ast.expr) -> list[str]:
  if isinstance(node, ast.Constant):
    return [node.value] if isinstance(node.value, str) else []
  if isinstance(node, ast.JoinedStr):
    return [''.join(part.value if isinstance(part, ast.Constant) else _filled(part.value) for part in node.values)]
  if isinstance(node, ast.IfExp):
    return [*_texts(node.body), *_texts(node.orelse)]
  if isinstance(node, ast.BinOp):
    return [left + right for left in _texts(node.left) or [HOLE] for right in _texts(node.right) or [HOLE]]
  return []


def _filled(node: ast.expr) -> str:
  """HOLE, or the text of a constant of the package."""
  return _constants().get(ast.unparse(node).rpartition('.')[2], HOLE)


@functools.cache
def _constants() -> dict[str, str]:
  found = {}
  for path in PACKAGE.rglob('*.py'):
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
      if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        found[ast.unparse(node.targets[0])] = node.value.value
  return found


def group_of(sentence: Sentence) -> str:
  return next(group for group, begins in GROUPS.items() if sentence.module.startswith(begins))


def tables() -> str:
  text = ''
  for group in GROUPS:
    rows = sorted((_cells(s) for s in sentences() if group_of(s) == group), key=lambda row: (row[0] == '', row))
    if rows:
      lines = ['| flag | message | fix |', '| --- | --- | --- |', *(f'| {" | ".join(row)} |' for row in rows)]
      text += f'## {group}\n\n' + '\n'.join(lines) + '\n\n'
  return text


def _cells(sentence: Sentence) -> list[str]:
  flag = f'`--{sentence.setting}`' if sentence.setting else ''
  return [flag, *(re.sub(r'([|*_<>\[\]`])', r'\\\1', part) for part in sentence.parts)]
