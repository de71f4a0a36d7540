"""The tables of docs/errors.md: every sentence of bad input in elder_jax/, with its fix, read from the source."""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import pathlib
import re

PACKAGE = pathlib.Path(__file__).parents[1] / 'elder_jax'
HOLE = '…'  # in place of what a message is filled with
_FOR_THE_USER = r'(?<!Input)(?<!Assertion)Error$'  # what commands raise and another part of them reports
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
    for setting, text in [*_raised(tree), *_passed_on(tree, module.startswith('commands/')), *_listed(tree)]:
      text = re.sub(f'{HOLE}+', HOLE, text)
      if len(re.findall(r'[a-z]{2,}', text)) >= 2:  # else all of it is filled in
        found.setdefault((setting, text), Sentence(module, setting, text))
  return tuple(found.values())


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """(setting, sentence) of each InputError."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef):
      local = _local(function)
      for node in _own(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith('InputError') and node.args:
          first = node.args[0]
          setting = first.value if len(node.args) == 3 and isinstance(first, ast.Constant) else ''
          for text in _texts(node.args[-1], local):
            yield str(setting), text


def _passed_on(tree: ast.Module, command: bool) -> Iterator[tuple[str, str]]:
  """Sentences that functions return, as `why_not` does, or commands raise as another error, for another to raise."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef):
      local = _local(function)
      for node in _own(function):
        if isinstance(node, ast.Return) and node.value is not None:
          yield from (('', text) for text in _texts(node.value, local) if '; ' in text and text.endswith('.'))
        elif command and isinstance(node, ast.Call) and node.args and re.search(_FOR_THE_USER, ast.unparse(node.func)):
          yield from (('', f'{text.rstrip(".")}.') for text in _texts(node.args[0], local))


def _listed(tree: ast.Module) -> Iterator[tuple[str, str]]:
  """Sentences that a table of the module holds."""
  for table in tree.body:
    tables = isinstance(table, ast.Assign) and isinstance(table.value, ast.Dict | ast.BinOp)
    for node in ast.walk(table) if tables else ():
      if isinstance(node, ast.Constant) and isinstance(node.value, str) and '; ' in node.value:
        yield '', node.value.rstrip('.') + '.'


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
  """Nodes of a function, those of functions in it apart."""
  waiting: list[ast.AST] = list(function.body)
  while waiting:
    node = waiting.pop(0)
    yield node
    waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.FunctionDef)]


def _local(function: ast.FunctionDef) -> dict[str, list[str]]:
  """Texts that names of a function are set to."""
  found: dict[str, list[str]] = {}
  for node in _own(function):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
      prose = [text if ' ' in text else HOLE for text in _texts(node.value, {})]
      found.setdefault(node.targets[0].id, []).extend(prose or [HOLE])
  return {name: texts for name, texts in found.items() if set(texts) != {HOLE}}


def _texts(node: ast.expr, local: dict[str, list[str]]) -> list[str]:
  """What an expression can be, with HOLE where that is not known; empty where none of it is a text."""
  if isinstance(node, ast.Constant):
    return [node.value] if isinstance(node.value, str) else []
  if isinstance(node, ast.Name):
    return local.get(node.id, [])
  if isinstance(node, ast.JoinedStr):
    return [''.join(parts) for parts in itertools.product(*(_part(value, local) for value in node.values))]
  if isinstance(node, ast.IfExp):
    texts = _texts(node.body, local), _texts(node.orelse, local)
    return [text for known in texts for text in known or [HOLE]] if any(texts) else []
  if isinstance(node, ast.BinOp):
    return [a + b for a in _texts(node.left, local) or [HOLE] for b in _texts(node.right, local) or [HOLE]]
  return []


def _part(node: ast.expr, local: dict[str, list[str]]) -> list[str]:
  """What a part of an f-string can be."""
  if not isinstance(node, ast.FormattedValue):
    return _texts(node, local)
  name = ast.unparse(node.value).rpartition('.')[2]
  if name in _constants():
    return [_constants()[name]]
  known = _texts(node.value, local) if isinstance(node.value, ast.Name | ast.IfExp) else []
  return [text if node.conversion != ord('r') or text == HOLE else repr(text) for text in known] or [HOLE]


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
    rows = sorted({_cells(s) for s in sentences() if group_of(s) == group}, key=lambda row: (row[0] == '', row))
    if rows:
      lines = ['| flag | message | fix |', '| --- | --- | --- |', *(f'| {" | ".join(row)} |' for row in rows)]
      text += f'## {group}\n\n' + '\n'.join(lines) + '\n\n'
  return text


def _cells(sentence: Sentence) -> tuple[str, ...]:
  flag = f'`--{sentence.setting}`' if sentence.setting else ''
  return (flag, *(re.sub(r'([|*_<>\[\]`])', r'\\\1', part) for part in sentence.parts))
