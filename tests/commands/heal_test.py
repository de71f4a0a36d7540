"""The verbs heal, report and chat, on a pruned folder."""

import json
import pathlib
import types

import pytest
from refusal import refused
import tiny as tiny_lib
from tiny import config_of

from elder_jax import commands
from elder_jax.commands import chat as chat_command
from elder_jax.commands.generate import GenerateSettings
from elder_jax.errors import InputError
from elder_jax.run import pipeline
from elder_jax.run.report import markdown
from elder_jax.training import trainer
from elder_jax.training.terms import loss_terms


@pytest.fixture
def pruned(settings, tmp_path) -> str:
  """An exported folder with four of the six layers."""
  more = dict(recipe='none', compare=(), num_remove=None, remove_layers=(2, 3), workdir=str(tmp_path / 'pruned'))
  pipeline.run(config_of(**settings | more))
  return str(tmp_path / 'pruned' / 'export')


@pytest.fixture
def healing(settings, pruned, tiny) -> dict:
  more = dict(model=pruned, recipe='heal', compare=(), num_remove=None, remove_layers=(), teacher=str(tiny))
  return settings | more | dict(distill=0.5, train_steps=6, method='auto')


def test_heal_trains_on_the_teachers_predictions_and_reports_the_lineage(healing, tiny, monkeypatch):
  teachers, train = [], trainer.run_steps
  monkeypatch.setattr(
    trainer, 'run_steps', lambda s, state, fixed, *a: teachers.append(fixed[1]) or train(s, state, fixed, *a)
  )
  report = pipeline.run(config_of(**healing))
  assert report['kept'] == [0, 1, 2, 3] and [t.num_layers for t in teachers] == [6]
  assert report['ppl']['text']['pruned'] < report['ppl']['text']['dense']
  assert [step['recipe'] for step in report['lineage']] == ['none', 'heal']
  assert report['lineage'][1] | {'tokens': 0} == {
    'model': 'export', 'layers': 4, 'removed': [], 'recipe': 'heal', 'teacher': tiny.name, 'tokens': 0,
  }  # fmt: skip
  export = pathlib.Path(healing['workdir']) / 'export'
  assert json.loads((export / 'elder_jax.json').read_text())['lineage'] == report['lineage']
  card = (export / 'README.md').read_text()
  assert f'1. {tiny.name}: 2 of 6 layers removed (2-3), recipe none.' in card
  assert f'recipe heal, trained on 768 tokens with {tiny.name} as teacher.' in card
  assert f'# {tiny.name}, 4 of 6 layers' in card and 'Kept: 0-1, 4-5.' in card
  lines = [json.loads(line) for line in (export.parent / 'metrics.jsonl').read_text().splitlines()]
  assert len(lines) == 6 and all(line['kl'] > 0 for line in lines)
  dense = pipeline.run(
    config_of(**healing | dict(model=str(tiny), recipe='none', teacher='', workdir=f'{export}-dense'))
  )
  assert report['teacher']['ppl'] == {'text': pytest.approx(dense['ppl']['text']['dense'], rel=1e-6)}
  ppl, of_teacher = report['ppl']['text'], report['teacher']['ppl']['text']
  points = 100 * (ppl['dense'] - ppl['pruned']) / of_teacher
  row = next(line for line in markdown(report).splitlines() if line.startswith('| PPL text'))
  cells = [cell.strip() for cell in row.split('|')[2:-1]]
  assert cells[:4] == [f'{v:.2f}' for v in (of_teacher, ppl['dense'], ppl['pruned'], points)]
  assert cells[4] == f'{768 / points:,.0f}'


@pytest.mark.parametrize(
  'changes, parts',
  [
    (dict(teacher=''), ['--distill=0.5', 'from itself', '--teacher']),
    (dict(teacher='{model}'), ['--teacher=', 'is --model itself']),
    (dict(teacher='{model}/../export'), ['--teacher=', 'is --model itself']),
    (dict(teacher='/nowhere'), ['--teacher=/nowhere', 'no such folder']),
    (dict(kept_layers='0,1,4'), ['--kept_layers=0,1,4', 'must name 4 of the layers 0 to 5']),
    (dict(kept_layers='0,1,4,4'), ['--kept_layers=0,1,4,4', 'in ascending order']),
    (dict(kept_layers='0,1,4,6'), ['--kept_layers=0,1,4,6', '0 to 5']),
    (dict(distill=0.0, distill_hidden=0.5, teacher=''), ['--distill_hidden=0.5', 'from itself', '--teacher']),
  ],
)
def test_what_heal_refuses(healing, changes, parts, no_long_work, no_text):
  changes = {k: v.format(model=healing['model']) if isinstance(v, str) else v for k, v in changes.items()}
  refused(healing, *parts, **changes)


def test_a_teacher_with_another_vocabulary(healing, tmp_path, no_long_work, no_text):
  other = tiny_lib.write_tiny_llama(tmp_path / 'other', vocab_size=300)
  refused(healing, '--teacher=', 'a vocabulary of 300', teacher=str(other))


@pytest.mark.parametrize(
  'other, part', [(dict(hidden_size=48), 'has 32 and --teacher has 48'), (dict(num_hidden_layers=5), 'the 5 layers')]
)
def test_a_teacher_whose_streams_cannot_be_compared(settings, other, part, tmp_path, no_long_work, no_text):
  teacher = str(tiny_lib.write_tiny_llama(tmp_path / 'other', **other))
  refused(settings, '--distill_hidden=0.5', part, 'leave it out', teacher=teacher, distill_hidden=0.5)


def test_the_verbs_heal_and_report(healing, capsys):
  names = ('model', 'teacher', 'workdir', 'train_data', 'seq_len', 'num_sequences', 'train_steps', 'lr', 'verify')
  args = ['--distributed=off', *(f'--{name}={healing[name]}' for name in names)]
  commands.run_verb('heal', args)
  out = capsys.readouterr().out
  assert 'healed (exported)' in out or 'Kept: [0, 1, 2, 3]' in out
  config = json.loads((pathlib.Path(healing['workdir']) / 'config.json').read_text())
  assert (config['recipe'], config['distill'], config['remove_layers']) == ('heal', [0.5], [])
  commands.run_verb('report', [healing['workdir']])
  assert capsys.readouterr().out.strip() in out
  with pytest.raises(SystemExit) as caught:
    commands.run_verb('heal', [*args, '--num_remove=2'])
  assert caught.value.code == 2 and 'num_remove' in capsys.readouterr().err


MERGEKIT = """
slices:
- sources:
  - model: dense
    layer_range: [0, 2]
- sources:
  - {model: dense, layer_range: [4, 6]}
"""


@pytest.mark.parametrize('how', ['elder_jax.json', 'mergekit_config.yml', '--kept_layers'])
def test_heal_compares_the_streams_of_the_remaining_layers(healing, monkeypatch, how):
  maps, folder = [], pathlib.Path(healing['model'])
  monkeypatch.setattr(trainer, 'loss_terms', lambda *args: maps.append(args[-1]) or loss_terms(*args))
  if how != 'elder_jax.json':
    (folder / 'elder_jax.json').unlink()
    with pytest.raises(InputError, match='distill_hidden=0.5.*is not known which.*give --kept_layers'):
      pipeline.run(config_of(**healing | dict(distill_hidden=0.5)))
  if how == 'mergekit_config.yml':
    (folder / how).write_text(MERGEKIT)
  given = dict(kept_layers='0,1,4-5') if how == '--kept_layers' else {}
  pipeline.run(config_of(**healing | dict(distill_hidden=0.5, train_steps=1, **given)))
  assert maps == [[0, 1, 4, 5]]
  line = (pathlib.Path(healing['workdir']) / 'metrics.jsonl').read_text().splitlines()[-1]
  assert json.loads(line)['hidden'] > 0


# ---- chat ----


def test_chat_keeps_the_turns_and_streams_whole_characters(tiny):
  chat = chat_command.open_chat(GenerateSettings(model=str(tiny), max_new_tokens=12, temperature=2.0, seed=3))
  first = list(chat.answer('one'))
  assert ''.join(first) and len(first) > 1
  list(chat.answer('two'))
  turns = [(turn['role'], turn['content']) for turn in chat._turns]
  assert turns[0] == ('user', 'one') and turns[1] == ('assistant', ''.join(first)) and turns[2] == ('user', 'two')
  with pytest.raises(InputError, match="exceeds the model's 256 positions"):
    list(chat.answer('long ' * 100))


def test_the_verb_chat(tiny, monkeypatch, capsys):
  said = iter(['one', 'two'])

  def answer_or_end(prompt):
    try:
      return next(said)
    except StopIteration:
      raise EOFError from None

  monkeypatch.setattr('builtins.input', answer_or_end)
  monkeypatch.setattr(chat_command, 'sys', types.SimpleNamespace(stdin=types.SimpleNamespace(isatty=lambda: False)))
  commands.run_verb('chat', [f'--model={tiny}', '--max_new_tokens=4'])
  assert len(capsys.readouterr().out) > 2


def test_a_model_without_a_chat_template(model):
  (model / 'chat_template.jinja').unlink()
  with pytest.raises(InputError, match='has no chat template'):
    chat_command.open_chat(GenerateSettings(model=str(model)))
