"""The answers of the dense and the exported model to the same prompts, in the report."""

import json
import pathlib

import pytest
from refusal import refused
from tiny import config_of

from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.run import exporting
from elder_jax.run import pipeline
from elder_jax.run.report import answers_section
from elder_jax.run.report import markdown
from elder_jax.text import answers
from elder_jax.text import data
from elder_jax.text.generation import generate


@pytest.fixture
def short(settings) -> dict:
  """A run that only removes two layers."""
  return settings | dict(method='last', recipe='none', compare=(), answer_tokens=6, prompts='')


def run(settings, **more) -> dict:
  return pipeline.run(config_of(**{**settings, **more}))


def alone(folder, prompt: str, new_tokens: int) -> str:
  source, tokenizer = open_source(str(folder), folder), data.load_tokenizer(str(folder))
  (tokens,) = generate(load_model(source, 'float32'), [tokenizer(prompt)['input_ids']], new_tokens, eos_ids=(1,))
  return tokenizer.decode(tokens, skip_special_tokens=True)


def test_answers_are_those_of_the_dense_model_and_of_the_export(short, tmp_path):
  report, work = run(short, compare=('absorb',)), tmp_path / 'work'
  assert [a['prompt'] for a in report['answers']] == list(answers.PROMPTS)
  for answer in (report['answers'][0], report['answers'][-1]):
    assert answer['dense'] == alone(pathlib.Path(short['model']), answer['prompt'], 6)
    assert answer['pruned'] == alone(work / 'export', answer['prompt'], 6)
  assert report['answers'][0]['dense'] != report['answers'][0]['pruned']
  assert json.loads((work / 'report.json').read_text())['answers'] == report['answers']
  for page in (work / 'report.md', work / 'export' / 'README.md'):
    text = page.read_text()
    assert '## Answers' in text and text.count('\npruned: ') == 5 and '> Question: What is 7 times 8?↵Answer:' in text
  stages = {path.stem: json.loads(path.read_text())['result'] for path in (work / 'stages').iterdir()}
  assert len(stages['dense']['answers']) == len(stages['none']['answers']) == 5
  assert 'answers' not in stages['absorb'] and not any('answers' in row for row in report['rows'])


def test_a_resumed_run_takes_answers_from_its_stages_and_an_earlier_version_has_none(short, monkeypatch, tmp_path):
  whole = run(short, workdir=str(tmp_path / 'whole'))

  def stopped(run):
    raise KeyboardInterrupt

  def before_the_export(work: pathlib.Path) -> dict:
    with monkeypatch.context() as patch:
      patch.setattr(exporting, 'export', stopped)
      with pytest.raises(KeyboardInterrupt):
        run(short, workdir=str(work))
    return dict(short, workdir=str(work))

  resumed, earlier = before_the_export(tmp_path / 'resumed'), before_the_export(tmp_path / 'earlier')
  monkeypatch.setattr(answers, 'answer', lambda *args: pytest.fail('it answered again'))
  assert run(resumed)['answers'] == whole['answers']
  for path in (tmp_path / 'earlier' / 'stages').glob('*.json'):
    saved = json.loads(path.read_text())
    saved['result'].pop('answers', None)
    path.write_text(json.dumps(saved))
  report = run(earlier)
  assert report['answers'] == [] and report['ppl'] == whole['ppl'] and 'Answers' not in markdown(report)
  del report['answers']  # as in a report of an earlier version
  assert markdown(report)


def test_a_report_with_one_answer_each_way():
  text = '\n'.join(answers_section({'answers': answers.pairs(['a\nb'], ['x\n```\ny\x0e\ufffd'], None)}))
  assert '> a↵b\ndense:  x↵```↵y\\x0e\ufffd\npruned: —\n```\n' in text
  many = answers_section({'answers': answers.pairs(['a'] * 12, ['b'] * 12, ['c'] * 12)})
  assert sum(line.startswith('> ') for line in many) == 10 and '2 more are in report.json.' in many
  assert answers.pairs(['a'], None, None) == answers.pairs([], [], []) == [] == answers_section({})


def test_a_model_that_cannot_answer_costs_its_answers_alone(short, monkeypatch, capsys):
  answer, asked = answers.answer, []

  def fails_later(*args):
    asked.append(1)
    if len(asked) > 1:
      raise InputError("the model's logits are not finite.")
    return answer(*args)

  monkeypatch.setattr(answers, 'answer', fails_later)
  report = run(short)
  assert report['answers'][0]['dense'] and report['answers'][0]['pruned'] is None and report['ppl']['text']['pruned']
  assert "no answers for none: the model's logits are not finite." in capsys.readouterr().err


def test_prompts_of_a_file(short, tmp_path):
  (tmp_path / 'p.txt').write_text('one\n\n two\n')
  (tmp_path / 'p.jsonl').write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "c"}\n')
  assert answers.read_prompts(str(tmp_path / 'p.txt')) == ['one', ' two']
  assert answers.read_prompts(str(tmp_path / 'p.jsonl')) == ['a\nb', 'c']
  report = run(short, prompts=str(tmp_path / 'p.jsonl'))
  assert [a['prompt'] for a in report['answers']] == ['a\nb', 'c']
  inputs = json.loads((tmp_path / 'work' / 'inputs.json').read_text())
  assert f'prompts={tmp_path / "p.jsonl"}' in inputs


def test_prompts_that_cannot_be_answered_are_refused(settings, tmp_path, no_long_work):
  refused(settings, f'--prompts={tmp_path}/gone', 'No such file', prompts=f'{tmp_path}/gone')
  file = tmp_path / 'p.jsonl'
  for content, why in (
    ('\n', 'has no prompts'),
    ('{"prompt": "a"}\n{"text": "b"}', 'line 2'),
    ('{"prompt": 3}', 'line 1'),
  ):
    file.write_text(content)
    refused(settings, f'--prompts={file}', why, prompts=str(file))
  file.write_text(json.dumps({'prompt': 'x' * 250}))
  refused(settings, f'--prompts={file}', 'takes 290 positions, the model has 256', prompts=str(file))
  assert 'makes the token 7' in answers.why_not([[1, 7]], 1, 7, None) and answers.why_not([[1], []], 1, 7, None)


def test_default_prompts_may_not_fit(short, capsys):
  assert run(short, answer_tokens=250)['answers'] == []
  assert 'skipping the prompts: with --answer_tokens=250' in capsys.readouterr().err


def test_a_run_that_measures_nothing_answers_only_given_prompts(settings, text, tmp_path, capsys):
  (tmp_path / 'p.txt').write_text('one\n')
  settings |= dict(num_remove=None, remove_layers='2', prompts='')
  copy = dict(recipe='none', compare=(), eval_data=())
  assert run(settings, **copy, workdir=str(tmp_path / 'a'))['answers'] == []
  assert 'prompts' not in capsys.readouterr().err
  assert run(settings, **copy, workdir=str(tmp_path / 'b'), prompts=str(tmp_path / 'p.txt'))['answers'] == []
  assert 'skipping --prompts: this run reads no text' in capsys.readouterr().err
  report = run(settings, **copy | dict(recipe='absorb', prompts=str(tmp_path / 'p.txt')))
  assert [a['prompt'] for a in report['answers']] == ['one'] and report['answers'][0]['pruned'] is not None


def test_a_token_that_must_come_first():
  def tokenizer(text, verbose):
    return {'input_ids': [2, *map(ord, text)] if text == 'b' else [*map(ord, text)]}

  assert answers.encode(['a', 'b'], tokenizer, None) == [[97], [2, 98]]
  assert answers.encode(['a', 'b'], tokenizer, 2) == [[2, 97], [2, 98]]
