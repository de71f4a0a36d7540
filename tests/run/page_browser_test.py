"""The pages in headless Chromium: drawn at the width of a phone and of a desk, light and dark, without a fault."""

import pathlib
import shutil

from figures_test import report as full_report
import pytest
from report_test import make

from elder_jax.run import page
from elder_jax.run.page import compare
from elder_jax.run.page.data import Finished

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
axe = pytest.importorskip('axe_playwright_python.sync_playwright', reason='axe-playwright-python is not installed')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no chromium or google-chrome is on the PATH')


@pytest.fixture(scope='module')
def browser():
  with playwright.sync_playwright() as started:
    opened = started.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
    yield opened
    opened.close()


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> pathlib.Path:
  """run.html, with a part of every kind and long words in it, and compare.html."""
  folder = tmp_path_factory.mktemp('pages')
  report = full_report()
  report['answers'] = [{'prompt': 'The capital of France is', 'dense': ' Paris.\n', 'pruned': 'ab' * 500}]
  report['lineage'] = [{'model': 'm' * 90, 'layers': 6, 'removed': [2, 3], 'recipe': 'none', 'tokens': 0}]
  report['train_data'] = [{'name': 'n' * 90, 'weight': 1.0, 'rows': 8, 'times': 1.0}]
  report['bytes'] = {'dense': 5e8, 'pruned': 4e8}
  report['choices'][0]['scores'] = [0.5] * 6
  for row, start in zip(report['rows'], (5.0, 4.0, 3.0, 6.0)):
    row['held_out'] = [[0, 0, start], [1, 128, start - 0.5]]
  speed = {'rows': [{'what': 'prompt', 'ratio': 1.3, 'ideal': 1.5}], 'device': 'x'}
  losses = {3: [(128, 5.0), (256, 4.5)]}
  run = Finished(report, f'runs/{"x" * 90}', losses, settings={'train_data': 's' * 200}, speed=speed)
  page.write(run, folder / 'run.html')
  (folder / 'compare.html').write_text(compare.html([run, Finished(make(), 'b')]), encoding='utf-8')
  return folder


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1400])
@pytest.mark.parametrize('name', ['run', 'compare'])
def test_a_page_is_drawn(browser, pages, name, width, scheme):
  # Bypassed for axe, which runs in the page; the test of the policy is below.
  context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme, bypass_csp=True)
  tab, faults = context.new_page(), []
  tab.on('console', lambda message: faults.append(message.text))
  tab.on('pageerror', lambda error: faults.append(str(error)))
  tab.on('request', lambda request: request.url.startswith(('file:', 'data:')) or faults.append(request.url))
  tab.goto((pages / f'{name}.html').as_uri())
  for opened in (False, True):
    tab.evaluate('open => document.querySelectorAll("details").forEach(part => part.open = open)', opened)
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    violations = axe.Axe().run(tab).response['violations']
    bad = [(v['id'], v['nodes'][0]['html'][:200]) for v in violations if v['impact'] in ('serious', 'critical')]
    assert not bad, bad
  assert not faults
  sizes = tab.evaluate('[...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().width)')
  assert sizes and all(250 <= size <= width for size in sizes)
  texts = tab.evaluate('[...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)')
  assert min(texts) >= 9
  context.close()


def test_dark_and_light_differ_and_a_policy_forbids_all_loading(browser, pages, tmp_path):
  seen = {}
  text = (pages / 'run.html').read_text().replace('</main>', '<img src="picture.png"><script>x</script></main>')
  (tmp_path / 'run.html').write_text(text)
  for scheme in ('light', 'dark'):
    tab, messages = browser.new_page(color_scheme=scheme), []
    tab.on('console', lambda message, messages=messages: messages.append(message.text))
    tab.goto((tmp_path / 'run.html').as_uri())
    seen[scheme] = tab.evaluate(
      '[document.body, document.querySelector("svg text"), document.querySelector(".gone")].map('
      'node => [getComputedStyle(node).backgroundColor, getComputedStyle(node).fill, getComputedStyle(node).color])'
    )
    assert len([m for m in messages if 'Content Security Policy' in m]) == 2, messages
    tab.close()
  assert all(light != dark for light, dark in zip(seen['light'], seen['dark']))
