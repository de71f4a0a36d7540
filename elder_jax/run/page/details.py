"""What is folded at the end of a page: texts, settings, times, versions."""

from xml.etree.ElementTree import Element

from elder_jax.errors import as_text
from elder_jax.run import lineage
from elder_jax.run.page.data import Finished
from elder_jax.run.page.elements import element
from elder_jax.run.page.elements import folded
from elder_jax.run.page.elements import section
from elder_jax.run.page.elements import table
from elder_jax.run.tables import figure
from elder_jax.run.tables import number
from elder_jax.run.tables import size


def details(run: Finished) -> Element:
  return section('Details', _texts(run), _settings(run), _lineage(run), _speed(run), _time(run), _versions(run))


def _texts(run: Finished) -> Element | None:
  corpora = run.report['corpora']
  if not corpora:
    return None
  keys = ('windows', 'window', 'bos', 'sha256', 'source')
  rows = [[corpus, *(str(about.get(key, '—')) for key in keys)] for corpus, about in corpora.items()]
  head = ['text', 'windows', 'tokens in each', 'BOS', 'sha256', 'source']
  protocols = ', '.join(dict.fromkeys(about.get('protocol', '—') for about in corpora.values()))
  return folded('Evaluation texts', table(head, rows, len(head)), element('p', None, f'Protocol: {protocols}.'))


def _settings(run: Finished) -> Element | None:
  if not run.settings:
    return None
  rows = [[f'--{name}', as_text(value)] for name, value in run.settings.items()]
  about = element('p', {'class': 'about'}, 'Settings that differ from the defaults. config.json has all of them.')
  return folded('Settings', about, table(['setting', 'value'], rows, 2))


def _lineage(run: Finished) -> Element | None:
  steps = run.report.get('lineage') or []
  items = [element('li', None, f'{lineage.sentence(step)}.') for step in steps]
  return folded('What was done to the model', element('ol', None, *items)) if items else None


def _speed(run: Finished) -> Element | None:
  if not run.speed:
    return None
  rows = [[str(row.get('what')), figure(row.get('ratio'), 3), figure(row.get('ideal'), 3)] for row in run.speed['rows']]
  about = f'Device: {run.speed.get("device")}. Ideal: number of layers before, over that after.'
  return folded('Speed', table(['pruned over dense', 'measured', 'ideal'], rows), element('p', None, about))


def _time(run: Finished) -> Element:
  report = run.report
  rows = [[stage, figure(value, 1, limit=1e9)] for stage, value in report['seconds'].items()]
  peak = number(report.get('peak_bytes'))
  memory = f' Peak memory of one device: {size(peak)}.' if peak > 0 else ''
  return folded('Time', table(['stage', 'seconds'], rows), element('p', None, f'Device: {report["device"]}.{memory}'))


def _versions(run: Finished) -> Element:
  rows = [[name, str(version)] for name, version in run.report['versions'].items()]
  return folded('Versions', table(['package', 'version'], rows, 2))
