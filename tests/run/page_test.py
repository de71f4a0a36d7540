"""report.html and the comparison of several runs: what they show, and that nothing in a report can break them."""

import contextlib
from html.parser import HTMLParser
import json
import pathlib
import re
import subprocess
import sys

from figures_test import BAD
from figures_test import figures
from figures_test import report as full_report
from figures_test import spoiled
import pytest
from report_test import make
from report_test import row
from report_test import sweep
from tiny import config_of

from elder_jax.log import write_json
from elder_jax.run import page
from elder_jax.run import pipeline
from elder_jax.run import usage
from elder_jax.run.page import charts
from elder_jax.run.page import notices
from elder_jax.run.page import sections
from elder_jax.run.page.data import Finished
from elder_jax.run.page.data import read_run
from elder_jax.run.page.elements import element
from elder_jax.run.tables import compact
from elder_jax.run.tables import ranges
from elder_jax.run.tables import size
from elder_jax.text import answers


class Parsed(HTMLParser):
  """Tags, attributes and the text that a reader sees."""

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str]] = []
    self.text, self.style, self.headings = '', '', []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_data(self, data):
    tag = self.tags[-1] if self.tags else ''
    if tag == 'style':
      self.style = data
    else:
      self.text += f'{data} '
      self.headings += [data] if tag == 'h2' else []

  def of(self, name: str) -> list[str]:
    return [value for attribute, value in self.attributes if attribute == name]


NEAR = ['sliding_attention', 'full_attention', 'sliding_attention']  # Gemma 2 alternates so


def shown(report: dict, **more) -> Parsed:
  return Parsed(page.html(Finished(report, 'runs/x', **more)))


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny, text) -> pathlib.Path:
  """The work folder of a run with as much as a tiny one can have."""
  work = tmp_path_factory.mktemp('finished') / 'work'
  settings = dict(model=str(tiny), method='elder', recipe='regularize', compare=('none', 'prune_then_train'))
  settings |= dict(workdir=str(work), train_data=str(text), eval_data=(f'text={text}',), seq_len=32, num_sequences=16)
  settings |= dict(batch_size=4, eval_seq_len=32, eval_tokens=256, num_remove=2, selection='iterative', gate_steps=2)
  settings |= dict(protect_first=1, protect_last=1, train_steps=4, lr=1e-3, verify='jax', answer_tokens=4)
  pipeline.run(config_of(**settings, validate_every=2, validation_sequences=4))
  return work


def test_a_run_ends_with_its_page(finished):
  text = (finished / page.NAME).read_text()
  parsed, report = Parsed(text), json.loads((finished / 'report.json').read_text())
  parts = [
    'Before you use it',
    'Results',
    'The same prompts',
    'Layers removed',
    'Training',
    'Gates',
    'Use it',
    'Details',
  ]
  assert parsed.headings == parts
  for name in ('dense', 'direct removal', 'prune, then train', 'regularise, then prune (exported)'):
    assert name in parsed.text
  for answer in report['answers']:
    assert answer['prompt'] in parsed.text
  assert f'removes {ranges(report["removed"])}' in parsed.text and '4 of 6' in re.sub(' +', ' ', parsed.text)
  assert parsed.tags.count('svg') == 4  # perplexity, held-out loss, training loss, gates
  assert f'{report["ppl"]["text"]["dense"]:.2f} → {report["ppl"]["text"]["pruned"]:.2f}' in parsed.text
  assert report['bytes']['pruned'] == (finished / 'export' / 'model.safetensors').stat().st_size
  assert f'vllm serve {finished}/export' in parsed.text and '--validate_every' in parsed.text
  assert len(text) < 150_000


def test_the_same_run_gives_the_same_bytes_and_each_chart_its_figures(finished):
  report = json.loads((finished / 'report.json').read_text())
  run = read_run(report, finished, str(finished))
  assert page.html(run) == (finished / page.NAME).read_text()
  held_out, training = charts.losses(run)
  assert held_out.rows[-1][:3] == [
    'regularise, then prune',
    *(f'{report["rows"][-1]["held_out"][i][2]:.4f}' for i in (0, -1)),
  ]
  rows = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['lm_loss'] for row in rows if row['stage'] == 'regularize']
  assert training.rows[-1] == ['regularise, then prune', f'{losses[0]:.4f}', f'{losses[-1]:.4f}', '512']
  (line,) = [line for line in training.draw('').axes[0].lines if line.get_label().endswith('(exported)')]
  assert line.get_xydata().tolist() == [[128 * (i + 1), loss] for i, loss in enumerate(losses)]


def test_training_losses_of_a_long_run_and_of_rounds(tmp_path):
  report = make(steps=120, tokens_per_step=10) | {'rows': [row('heal', 9.0, 9.0) | {'round': r} for r in (1, 2)]}
  for r in (1, 2):
    (tmp_path / 'runs' / f'round_{r}').mkdir(parents=True)
    lines = [{'stage': 'heal', 'step': i, 'lm_loss': float(i // 3 + 100 * r)} for i in range(120)]
    text = ''.join(json.dumps(line) + '\n' for line in lines) + '{"stage": "heal", "st'
    (tmp_path / 'runs' / f'round_{r}' / 'metrics.jsonl').write_text(text)
  run = read_run(report, tmp_path, 'x')
  assert run.mean_of == 3 and run.losses[1] == [(30 * (i + 1), i + 200.0) for i in range(40)]
  assert [name for name, *_ in charts.losses(run)[0].rows] == ['healed, round 1', 'healed, round 2']


# ---- reports of every kind ----


def test_what_a_report_lacks_is_left_out():
  first = ['Before you use it', 'Results', 'Layers removed', 'Gates', 'Use it', 'Details']
  assert shown(make()).headings == first
  rows = [{'method': 'given', 'recipe': 'none', 'removed': [2, 3], 'ppl': {}, 'tasks': {}}]
  cut = shown(make('none', ppl={}, gates=[], corpora={}, rows=rows, choices=[], method='given'))
  assert cut.headings == ['Before you use it', 'Layers removed', 'Use it', 'Details'] and 'svg' not in cut.tags
  assert 'Nothing was measured' in cut.text
  healed = {'heals': True, 'steps': 3, 'tokens_per_step': 8, 'rows': [row('heal', 9.0, 6.0, removed=())]}
  whole = shown(make('heal', removed=[], kept=list(range(6))) | healed)
  assert 'Layers removed' not in whole.headings and 'before' in whole.text and '0.89 ×' in whole.text


def test_the_page_warns_of_a_converter_as_the_card_does():
  regular, other = (
    usage.NOTHING._replace(config={'model_type': 'gemma2', 'layer_types': of}) for of in (NEAR, NEAR[1:])
  )
  assert 'convert_hf_to_gguf.py runs/x/export' in shown(make(), files=regular).text
  parsed = shown(make(), files=other)
  assert 'would be another model' in parsed.text and 'ollama run' not in parsed.text


def test_an_export_that_cannot_be_read_has_commands_for_any_model(tmp_path, capsys):
  (tmp_path / 'export').mkdir()
  (tmp_path / 'export' / 'a.gguf').write_bytes(b'')
  assert read_run(make(), tmp_path, 'x').export == 'x/export/a.gguf'
  assert 'cannot be read' in capsys.readouterr().err


def test_depths_methods_merges_and_gguf():
  parsed = shown(sweep(), files=usage.NOTHING._replace(gguf='a.gguf', chat=True))
  assert 'Perplexity on wiki over layers' in parsed.text and '2, 3 into 1' in parsed.text
  assert 'llama-cli -m runs/x/export/a.gguf' in parsed.text and 'vllm' not in parsed.text


def test_without_matplotlib_the_figures_are_tables(monkeypatch):
  report = make(steps=10**4, tokens_per_step=1000)
  assert '<svg' in page.html(Finished(report, 'x'))
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  html = page.html(Finished(report, 'x'))
  assert '<svg' not in html and 'elder_jax[report]' in html and '<table' in html


@pytest.mark.parametrize('bad', BAD, ids=lambda bad: type(bad).__name__ + str(bad)[:4].replace('<', ''))
def test_a_figure_that_is_missing_or_not_finite_is_a_dash(bad, monkeypatch):
  made, ugly = full_report(), re.compile(r'\b(nan|inf|None|N/A)\b')
  for path in list(figures(made)):
    with contextlib.suppress(KeyError, IndexError):  # rows share their figures: one is missing already
      made = spoiled(made, path, bad)
  assert not ugly.search(shown(made).text)
  monkeypatch.setattr(
    charts.Chart, '__post_init__', lambda chart: object.__setattr__(chart, 'draw', lambda title: None)
  )
  monkeypatch.setattr(sections, 'svg', lambda figure, name, title: element('svg'))
  for path in figures(full_report()):
    assert not ugly.search(shown(spoiled(full_report(), path, bad)).text), path


def test_matplotlib_is_not_imported_for_a_page_without_charts(tmp_path):
  rows = [{'method': 'given', 'recipe': 'none', 'removed': [2, 3], 'ppl': {}, 'tasks': {}}]
  write_json(tmp_path / 'report.json', make('none', ppl={}, gates=[], corpora={}, rows=rows, choices=[]))
  code = (
    'import sys; from elder_jax import commands; commands.run_verb("report", sys.argv[1:]); '
    'assert not any(name.partition(".")[0] == "matplotlib" for name in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, capture_output=True, timeout=300)
  assert (tmp_path / page.NAME).is_file()


# ---- what a model or a name may hold ----

NASTY = (
  '</style></title><script>alert(1)</script><img src="http://x.example/a.png" onerror=\'b\'>&amp; $x^$ '
  '\x00\u202e\ud800 漢字'
)


def test_text_is_text():
  made = full_report() | {'model': NASTY, 'device': NASTY, 'versions': {NASTY: NASTY}}
  made['answers'] = [{'prompt': NASTY, 'dense': NASTY, 'pruned': None}]
  made['lineage'] = [{'model': NASTY, 'layers': 6, 'removed': [2], 'recipe': NASTY, 'tokens': 3, 'teacher': NASTY}]
  for part in ('ppl', 'corpora'):
    made[part] = {NASTY + name: of_name for name, of_name in made[part].items()}
  for of_row in made['rows']:
    of_row |= {'ppl': {NASTY + name: value for name, value in of_row['ppl'].items()}, 'method': NASTY}
  for kind in ('dense', 'pruned'):
    made['tasks'][kind] = {NASTY: made['tasks'][kind]['piqa']}
  text = page.html(Finished(made, NASTY, settings={'model': NASTY}, speed={'rows': [{'what': NASTY, 'ratio': 1.2}]}))
  text.encode('utf-8')
  parsed = Parsed(text)
  assert not {'script', 'img', 'iframe', 'object', 'base'} & set(parsed.tags) and 'onerror' not in dict(
    parsed.attributes
  )
  assert parsed.text.count('<script>alert(1)</script>') > 20 and '漢字' in parsed.text
  assert '\x00' not in text and '\u202e' not in text


def test_nothing_is_loaded_and_ids_are_unique(finished):
  text = (finished / page.NAME).read_text()
  parsed = Parsed(text)
  for link in parsed.of('href') + parsed.of('src'):
    assert link.startswith(('#', 'data:')), link
  assert 'url(' not in parsed.style and '@import' not in parsed.style and '@font-face' not in parsed.style
  assert "default-src 'none'" in text and 'xmlns' not in text
  ids = parsed.of('id')
  assert len(ids) == len(set(ids)) > 10
  assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == set(ids)
  assert not re.findall(r'(?:fill|stroke): #(?!fff)', text)  # style.css has the colours


def test_a_large_report_is_a_small_file():
  corpora = [f'text {i}' for i in range(20)]
  rows = [
    row('none', 1.0, 1.0, f'method {i % 20}', range(i % 3 + 1, 60)) | {'ppl': {c: 9.0 + i for c in corpora}}
    for i in range(60)
  ]
  made = make(rows=rows, num_layers=126, removed=list(range(3, 60)), steps=9, tokens_per_step=9)
  made['ppl'] = {c: {'dense': 8.0, 'pruned': 9.0} for c in corpora}
  made['answers'] = [{'prompt': 'x' * 10**5, 'dense': '<' * 10**5, 'pruned': 'z'}] * 100
  scores = [float(i) for i in range(126)]
  made['choices'] = [{'method': f'm {i}', 'chosen': [3], 'num_remove': 1, 'scores': scores} for i in range(20)]
  assert len(page.html(Finished(made, 'x')).encode()) < 1_500_000


# ---- warnings ----


def test_warnings():
  report = make(steps=10, tokens_per_step=1000, tasks={'dense': {'piqa': {'acc': 0.7, 'n': 100}}, 'pruned': {}})
  report['ppl'] = {'wiki': {'dense': 10.0, 'pruned': 12.0}, 'news': {'dense': 10.0, 'pruned': 16.0}}
  report['rows'] = [row('none', 11.0, 17.0), row('regularize', 12.0, 16.0)]
  report |= {'bytes': {'dense': 9e8, 'pruned': 1.2e9}, 'verify': {'torch_error': 'no kernel'}}
  tokens, worse, questions, rival, unverified, larger = notices.warnings(report)
  assert '10,000 tokens' in tokens and 'smoke test' in tokens
  assert '1.60 × on news, 1.20 × on wiki' in worse
  assert 'piqa (100)' in questions and rival.startswith('On wiki, "direct removal"')
  assert unverified.startswith('Not verified in PyTorch: no kernel') and '(900 MB → 1.2 GB)' in larger
  report['rows'][-1]['ppl'] = {'wiki': 10.5, 'news': None}
  assert notices.warnings(report)[0] == 'Perplexity on news has no finite value.'
  fine = make(steps=10**4, tokens_per_step=1000, bytes={'dense': 2, 'pruned': 1})
  fine['ppl'], fine['rows'] = {'wiki': {'dense': 10.0, 'pruned': 12.9}}, [row('regularize', 12.9, 12.9)]
  assert notices.warnings(fine) == []


def test_the_default_prompts_have_the_capital_of_france():
  assert any('capital of France' in prompt for prompt in answers.PROMPTS)


def test_figures_in_three_digits():
  assert [compact(n) for n in (0, 999, 16384, 512_000, 999_600, 1.5e6, 6.74e9, 1.2e12, None)] == [
    *('0', '999', '16.4k', '512k', '1M', '1.5M', '6.74B', '1,200B', '—')
  ]
  assert [size(n) for n in (65_900, 423.4e6, 13.5e9, 1.5e12, 'x')] == ['65.9 kB', '423 MB', '13.5 GB', '1,500 GB', '—']
  assert ranges([18, 3, 12, 13, 17]) == '3, 12–13, 17–18' and ranges([]) == ''
