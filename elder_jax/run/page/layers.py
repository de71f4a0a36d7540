"""Which layers go: a strip for each rule, a cell for each layer."""

from collections.abc import Iterable
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import folded
from elder_jax.run.page.elements import section
from elder_jax.run.page.elements import table
from elder_jax.run.tables import figure
from elder_jax.run.tables import ranges

_FEW = 64  # layers whose cells have gaps between them


def layers(run: Finished) -> Element | None:
  """The candidates of the exported choice, or the choice alone; then the other choices, and all scores."""
  report = run.report
  if not report['removed']:
    return None
  depth, choices = report['num_layers'], report['choices']
  first = choices[0] if choices else {'method': report.get('method', '')}
  parts = [_legend(), *_candidates(depth, first)]
  if not parts[1:] or sorted(first['candidates'][0]['removed']) != sorted(report['removed']):  # swaps changed it
    parts.append(strip(depth, report['removed'], f'{first["method"]} (chosen)'))
  rounds = [row for row in report['rows'] if 'round' in row]
  parts += [strip(depth, row['removed'], f'after round {row["round"]}') for row in rounds[:-1]]
  parts += [*_sentences(first), *_search(report)]
  others = [c for c in choices if c is not first and c.get('chosen')]
  if others:
    strips = [[strip(depth, c['chosen'], f'{c["method"]}, {len(c["chosen"])} layers'), *_sentences(c)] for c in others]
    parts.append(folded(f'Other choices ({len(others)})', *(part for of_one in strips for part in of_one)))
  return section('Layers removed', *parts, *_scores(choices))


def strip(depth: int, removed: Sequence[int], name: str, figures: str = '') -> Element:
  """A line of cells, the removed layers marked, and the same in words."""
  gone, words = set(removed), f'removes {ranges(removed)}'
  cells = []
  for l in range(depth):
    kind = 'gone' if l in gone else 'kept'
    cells.append(element('span', {'class': kind, 'title': f'layer {l}: {"removed" if l in gone else "kept"}'}))
  step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if depth / n <= 12)
  ticks = [element('span', {'style': f'grid-column: {l + 1}'}, str(l)) for l in range(0, depth, step)]
  columns = f'grid-template-columns: repeat({depth}, minmax(0, 1fr))'
  head = [element('b', None, name), ' ', element('span', None, words), ' ']
  head.append(element('span', {'class': 'loss'}, figures))
  label = f'{name}: {words} of {depth} layers, numbered from 0'
  shape = {'class': 'cells' if depth <= _FEW else 'cells many', 'style': columns}
  return element(
    'div',
    {'class': 'strip chosen' if name.endswith('(chosen)') else 'strip'},
    element('div', {'class': 'of'}, *head),
    element('div', shape | {'role': 'img', 'aria-label': label}, *cells),
    element('div', {'class': 'ticks', 'style': columns, 'aria-hidden': 'true'}, *ticks),
  )


def _legend() -> Element:
  return element(
    'p',
    {'class': 'legend'},
    element('span', None, element('span', {'class': 'key kept'}), 'kept'),
    element('span', None, element('span', {'class': 'key gone'}), 'removed'),
    element('span', None, 'Layers are numbered from 0, as in the dense model.'),
  )


def _candidates(depth: int, choice: dict) -> Iterable[Element]:
  candidates = choice.get('candidates') or []
  if not candidates:
    return
  about = f'Candidates of {choice["method"]} by held-out loss after absorb. The lowest loss wins.'
  if any(c.get('again') is not None for c in candidates):
    about = f'Candidates of {choice["method"]}, the winner first. The best by held-out loss were judged a second time.'
  yield element('p', {'class': 'about'}, about)
  swapped = sorted(choice.get('chosen') or []) != sorted(candidates[0]['removed'])
  for i, c in enumerate(candidates):
    loss = f'loss {figure(c.get("loss"), 3)}'
    if c.get('again') is not None:
      loss += f', second judgement {figure(c["again"], 3)}'
    yield strip(depth, c['removed'], c['method'] if i or swapped else f'{c["method"]} (chosen)', loss)


def _sentences(choice: dict) -> Iterable[Element]:
  if merges := choice.get('merges'):
    merged = '; '.join(f'{", ".join(map(str, members))} into {base}' for base, *members in merges)
    yield element('p', None, f'Merged layers: {merged}.')
  if swaps := choice.get('swaps'):
    made = '; '.join(f'{out} in place of {back} (loss {figure(loss, 4)})' for back, out, loss in swaps)
    yield element('p', None, f'Swaps kept, of {choice.get("tried")} tried: {made}.')


def _search(report: dict) -> Iterable[Element]:
  if search := report.get('search'):
    tried = '; '.join(f'{n} layers {figure(100 * increase, 1)}%' for n, increase in search)
    about = 'Increase of held-out perplexity before training, by the number of layers removed'
    yield element('p', None, f'{about}: {tried}.')


def _scores(choices: Sequence[dict]) -> Iterable[Element]:
  """A folded table for each choice: the scores of its rule, or of each of its candidates."""
  for choice in choices:
    scored = [c for c in choice.get('candidates') or [choice] if c.get('scores')]
    if not scored:
      continue
    rows = [[str(l), *(_score(c['scores'], l) for c in scored)] for l in range(max(len(c['scores']) for c in scored))]
    about = 'Each rule has its own unit. A rule that scores blocks has a score for the first layer of each block.'
    title = f'Scores of {choice["method"]}' + (f', {len(choice["chosen"])} layers' if len(choices) > 1 else '')
    scores = table(['layer', *(c['method'] for c in scored)], rows, name=title)
    yield folded(title, element('p', {'class': 'about'}, about), scores)


def _score(scores: Sequence[float], layer: int) -> str:
  return f'{value:.4g}' if layer < len(scores) and isinstance(value := scores[layer], int | float) else '—'
