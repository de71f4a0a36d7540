"""Documents are easy to read: short lines of code, short paragraphs, short sentences."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
  'README.md',
  'CONTRIBUTING.md',
  'launch/README.md',
  *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'docs').rglob('*.md')),
]
MOST_COLUMNS, MOST_IN_PARAGRAPH, MOST_IN_SENTENCE = 100, 90, 30
_ITEM = re.compile(r'\s*([-*]|\d+\.) ')


def code_and_paragraphs(text: str) -> tuple[list[str], list[str]]:
  """Lines of code, and paragraphs as they are read: without tables, headings, code, HTML, and targets of links.

  Each item of a list is a paragraph.
  """
  code, paragraphs, fenced = [], [''], False
  for line in re.sub(r'<!--.*?-->', '', text, flags=re.DOTALL).splitlines():
    if line.lstrip().startswith('```'):
      fenced = not fenced
    elif fenced or (line.startswith('    ') and not _ITEM.match(line)):
      code.append(line)
    elif re.match(r'\s*(\||#|<|:::|!\[|$)', line):
      paragraphs.append('')
    elif _ITEM.match(line):
      paragraphs.append(_ITEM.sub('', line, count=1))
    else:
      paragraphs[-1] += f' {line.strip()}'
  return code, [found for paragraph in paragraphs if (found := _read(paragraph))]


def _read(paragraph: str) -> str:
  text = re.sub(r'`[^`]+`', 'Code', paragraph)  # inline code counts as a word
  text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
  return re.sub(r'\*+|<[^>]+>', '', text).strip()


def sentences(paragraph: str) -> list[str]:
  """They end in . ! or ? before a space and what can begin the next one; a colon or a semicolon ends none."""
  return re.split(r'(?<=[.!?])["\')]*\s+(?=["\'(]?[A-Z0-9×])', paragraph)


def words(text: str) -> int:
  return sum(any(c.isalnum() for c in word) for word in text.split())


@pytest.mark.parametrize('name', DOCUMENTS)
def test_lines_paragraphs_and_sentences_are_short(name):
  code, paragraphs = code_and_paragraphs((ROOT / name).read_text(encoding='utf-8'))
  assert code or paragraphs
  found = [f'{len(line)} columns: {line}' for line in code if len(line) > MOST_COLUMNS]
  found += [f'{words(p)} words: {p}' for p in paragraphs if words(p) > MOST_IN_PARAGRAPH]
  found += [f'{words(s)} words: {s}' for p in paragraphs for s in sentences(p) if words(s) > MOST_IN_SENTENCE]
  assert not found, '\n'.join(found)


def test_how_a_document_is_read():
  text = (
    '# A heading of words\n\nOne `--flag=value` here. Two\n[a link](target.md#part) there: fine.\n'
    '- An item\n  goes on.\n- 1.5 is no end\n\n| a | table |\n\n    code here\n\n```sh\nmore code\n```\n'
  )
  code, paragraphs = code_and_paragraphs(text)
  assert code == ['    code here', 'more code']
  assert paragraphs == ['One Code here. Two a link there: fine.', 'An item goes on.', '1.5 is no end']
  assert sentences(paragraphs[0]) == ['One Code here.', 'Two a link there: fine.']
  assert words('One — two, three') == 3
