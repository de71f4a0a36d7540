"""HTML as trees of xml.etree, which escapes all text: prompts, answers and names may hold anything."""

from collections.abc import Sequence
import io
import pathlib
import re
from xml.etree import ElementTree

from elder_jax.run import drawing
from elder_jax.run.report import printable

Element = ElementTree.Element
# Nothing is loaded, whatever the page holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def element(tag: str, attributes: dict[str, str] | None = None, *children: Element | str | None) -> Element:
  """A tag with its attributes and, in their order, texts and elements; None is left out."""
  made = Element(tag, {name: _text(value) for name, value in (attributes or {}).items()})
  last = None
  for child in children:
    if isinstance(child, Element):
      made.append(child)
      last = child
    elif child and last is None:
      made.text = (made.text or '') + _text(child)
    elif child and last is not None:
      last.tail = (last.tail or '') + _text(child)
  return made


def _text(text: str) -> str:
  return printable(text, besides='\n\t')


def document(title: str, *children: Element | None) -> str:
  """A whole page."""
  css = pathlib.Path(__file__).with_name('style.css').read_text(encoding='utf-8')
  head = element(
    'head',
    None,
    element('meta', {'charset': 'utf-8'}),
    element('meta', {'http-equiv': 'Content-Security-Policy', 'content': _POLICY}),
    element('meta', {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'}),
    element('meta', {'name': 'color-scheme', 'content': 'light dark'}),
    element('link', {'rel': 'icon', 'href': 'data:,'}),
    element('title', None, title),
    element('style', None, css),
  )
  whole = element('html', {'lang': 'en'}, head, element('body', None, element('main', None, *children)))
  return f'<!doctype html>\n{ElementTree.tostring(whole, encoding="unicode", method="html")}\n'


def section(title: str, *children: Element | None) -> Element:
  return element('section', None, element('h2', None, title), *children)


def folded(title: str, *children: Element | None) -> Element:
  return element('details', None, element('summary', None, title), *children)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, name: str = '') -> Element:
  """A table that scrolls by itself where it is too wide. The first `text_columns` are text, the others figures.

  Args:
    name: what a screen reader calls it.
  """

  def line(tag: str, cells: Sequence[str], strong: bool = False) -> Element:
    made = element('tr', {'class': 'exported'} if strong else None)
    for i, cell in enumerate(cells):
      kind = {'class': 'figure'} if i >= text_columns else {}
      header = tag == 'th' or not i
      scope = {'scope': 'col' if tag == 'th' else 'row'} if header else {}
      made.append(element('th' if header else 'td', kind | scope, cell))
    return made

  body = [line('td', row, row[0].endswith('(exported)')) for row in rows]
  made = element('table', None, element('thead', None, line('th', head)), element('tbody', None, *body))
  return element('div', {'class': 'scroll', 'tabindex': '0', 'role': 'region', 'aria-label': name or head[0]}, made)


def svg(figure, name: str, title: str) -> Element:
  """A matplotlib figure as an inline SVG: its ids begin with `name`, and style.css gives its colours."""
  file = io.StringIO()
  drawing.save(figure, file, name=name)
  root = ElementTree.fromstring(file.getvalue())
  for node in root.iter():
    node.tag = node.tag.rpartition('}')[2]
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag in ('metadata', 'style'):  # this style would hold for the whole page
        parent.remove(child)
  used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', file.getvalue()))
  for node in root.iter():
    _adapt(node, name, used)
  box = root.get('viewBox', '')
  root.attrib.clear()
  root.attrib.update({'viewBox': box, 'role': 'img', 'aria-label': _text(title)})
  return root


def _adapt(node: Element, name: str, used: set[str]):
  """Drops ids that nothing refers to and makes the others the page's own; names colours; leaves fonts to the page."""
  if node.get('id') in used:
    node.set('id', f'{name}-{node.get("id")}')
  else:
    node.attrib.pop('id', None)
  if link := node.attrib.pop('{http://www.w3.org/1999/xlink}href', None):
    node.set('href', f'#{name}-{link[1:]}')
  if clip := node.get('clip-path'):
    node.set('clip-path', clip.replace('url(#', f'url(#{name}-'))
  if look := node.get('style'):
    look = re.sub(r'#[0-9a-f]{6}\b', lambda found: _colour(found[0]), look)
    look = re.sub(r'font-family: [^;]*;? ?', '', look)
    node.set('style', look.replace('url(#', f'url(#{name}-'))
  for part in ('text', 'tail'):
    if (text := getattr(node, part)) and not text.strip():
      setattr(node, part, None)
  if node.tag == 'text' and node.text:
    node.text = _text(node.text)


def _colour(code: str) -> str:
  return f'var(--{drawing.NAMES[code]})' if code in drawing.NAMES else code
