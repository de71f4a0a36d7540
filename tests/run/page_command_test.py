"""elder_jax report: pages of runs, a comparison, pictures, and what is refused; the measured speed-up."""

import json
import pathlib

import pytest
from report_test import make
from report_test import row

from elder_jax import commands
from elder_jax.log import write_json
from elder_jax.run import page
from elder_jax.run import results
from elder_jax.run.page import compare
from elder_jax.run.page.data import Finished
from elder_jax.run.page.data import read_run


def run_of(folder: pathlib.Path, wiki: float = 20.5, **changes) -> pathlib.Path:
  folder.mkdir()
  rows = [row('none', 30.0, 31.0), row('regularize', wiki, 9.5)]
  write_json(folder / 'report.json', make(rows=rows) | changes)
  return folder


def test_pages_a_comparison_and_pictures(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  a, b = run_of(tmp_path / 'a'), run_of(tmp_path / 'b', 18.0)
  commands.run_verb('report', ['a', 'b', '--png'])
  out = capsys.readouterr().out
  assert out.count('| regularise, then prune (exported) |') == 2
  assert 'The report: a/report.html' in out and 'The comparison: compare.html' in out
  for folder in (a, b):
    assert '<svg' in (folder / page.NAME).read_text()
    pictures = sorted(path.name for path in folder.glob('*.png'))
    assert pictures == ['gates-1.png', 'layers.png', 'perplexity-1-wiki.png', 'perplexity-2-news.png']
    assert all((folder / name).read_bytes().startswith(b'\x89PNG') for name in pictures)
  text = (tmp_path / 'compare.html').read_text()
  assert '20.50 (2.02 ×)' in text and '18.00 (1.78 ×)' in text and 'Before you compare' not in text
  commands.run_verb('report', ['a', 'b', '--out=other.html'])
  assert (tmp_path / 'other.html').read_text() == text and not list(tmp_path.rglob('*.partial'))
  assert 'A chart' not in capsys.readouterr().out


def test_a_report_under_another_name_has_its_page_beside_it(tmp_path, capsys):
  folder = run_of(tmp_path / 'a')
  (folder / 'report.json').rename(folder / 'old.json')
  commands.run_verb('report', [str(folder / 'old.json')])
  assert (folder / 'old.html').is_file() and not (folder / page.NAME).exists()


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (['a', '--out=x.html'], '--out=x.html: is for the comparison of several runs'),
    (['a', 'b', '--out=gone/x.html'], 'is not a file in an existing folder'),
    (['a', 'gone'], 'there is no such file'),
    (['a', 'list'], 'is not the report of a run (it is not a JSON object)'),
    (['taken'], 'taken: cannot be written'),
  ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, arguments, sentence):
  monkeypatch.chdir(tmp_path)
  for name in ('a', 'b'):
    run_of(tmp_path / name)
  (run_of(tmp_path / 'taken') / page.NAME).mkdir()
  (tmp_path / 'list').mkdir()
  (tmp_path / 'list' / 'report.json').write_text('[]')
  with pytest.raises(SystemExit) as caught:
    commands.run_verb('report', arguments)
  err = capsys.readouterr().err
  assert caught.value.code == 2 and sentence in err and err.count('\n') == 1, err


def test_a_page_that_cannot_be_made_costs_nothing_else(tmp_path, monkeypatch, capsys):
  def broken(run):
    raise ValueError('no such part')

  monkeypatch.setattr(page, 'html', broken)
  results.write_pages(make(), tmp_path, 'x')
  assert 'report.html could not be written (no such part)' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['report.md']


def test_perplexities_on_different_windows_are_not_compared(tmp_path):
  first, second = make(), make(model='other/model')
  second['corpora']['wiki']['windows'] = 9
  runs = [Finished(first, 'a'), Finished(second, 'b')]
  assert compare.comparable(runs, 'news') and not compare.comparable(runs, 'wiki')
  text = compare.html(runs)
  assert 'The runs measured wiki on different texts or windows' in text and 'Perplexity on wiki, × dense' in text
  assert 'The runs have different dense models.' in text and 'dense: other/model' in text


def test_the_measured_speed_up(tmp_path, capsys):
  folder = run_of(tmp_path / 'a')
  report = json.loads((folder / 'report.json').read_text())
  assert read_run(report, folder, 'a').speed is None
  measured = {'layers': {'dense': 6, 'pruned': 4}, 'device': 'a card', 'settings': {}}
  measured['rows'] = [{'what': 'prompt of 8', 'ratio': 1.31, 'ideal': 1.5}, {'what': 'batch 1', 'ratio': 1.277}]
  write_json(folder / 'speed.json', measured)
  text = page.html(read_run(report, folder, 'a'))
  assert '1.28 ×' in text and 'batch 1' in text and 'a card' in text
  write_json(folder / 'speed.json', measured | {'layers': {'dense': 6, 'pruned': 5}})
  assert read_run(report, folder, 'a').speed is None
  assert 'is of 5 layers, the export has 4' in capsys.readouterr().err
  (folder / 'speed.json').write_text('{')
  assert read_run(report, folder, 'a').speed is None and 'not readable as JSON' in capsys.readouterr().err
