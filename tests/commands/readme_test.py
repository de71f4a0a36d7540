"""The commands of README and of docs/quickstart.md, run as they stand there but for names: a tiny model, short texts, few
steps.
"""

import json
import pathlib
import re
import shlex

from gguf_files import CASES
from gguf_files import SIZES
from gguf_files import write_gguf
import pytest

from elder_jax import commands

ROOT = pathlib.Path(__file__).parents[2]
SHORT = (
  '--seq_len=32 --num_sequences=16 --batch_size=4 --eval_seq_len=32 --eval_tokens=256 --score_steps=1 --verify=jax '
  '--protect_first=1 --protect_last=1 --gate_steps=1 --train_steps=2 --lr=1e-3'
)


def lines_of(document: str) -> list[str]:
  """Its commands of elder_jax, in their order."""
  text = (ROOT / document).read_text(encoding='utf-8')
  block = re.findall(r'^    (?:elder_jax|  --).*$', text, re.MULTILINE)
  text = '\n'.join(line.strip() for line in block).replace('\\\n', ' ')
  return [line for line in text.split('\n') if line.startswith('elder_jax ')]


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty folder to run in."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('elder_jax.devices.hosts.start', lambda launch: None)
  return tmp_path


@pytest.fixture
def tiny_gguf(here) -> pathlib.Path:
  """A tiny Qwen3 as llama.cpp's converter writes it."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model('qwen3', **SIZES | CASES['qwen3'] | dict(num_hidden_layers=4))
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(here / 'qwen3')
  return write_gguf(here / 'qwen3.gguf', here / 'qwen3')


@pytest.mark.slow
def test_readmes_commands_run_in_their_order(here, tiny, text, capsys):
  for name in ('texts.jsonl', 'more.jsonl'):
    (here / name).write_text(json.dumps({'text': text.read_text()}) + '\n')
  (here / 'news.txt').write_text(text.read_text())
  small = f'--model={tiny} --train_data={text} --eval_data=text={text} --num_remove=2 --workdir=runs/tiny {SHORT}'
  (here / 'tiny.flags').write_text('\n'.join(small.split()))
  lines, ran = lines_of('README.md'), []
  assert len(lines) >= 12
  for number, line in enumerate(lines):
    verb, *args = shlex.split(line)[1:]
    if '--topology' in line or verb in ('eval', 'chat', 'export-gguf'):
      continue  # the TPU compiler, questions from the hub, a terminal, a GGUF file: tests of their own
    plain = any(arg in ('--model=MODEL', '--model=FOLDER') for arg in args)  # no config makes it small
    args = [re.sub('DENSE|FOLDER|MODEL', str(tiny), arg) for arg in args]
    args = [re.sub(r'^--model=[\w.-]+/[\w.-]+$', f'--model={tiny}', arg) for arg in args]
    args = [re.sub(r'^--config=.*', '--config=tiny.flags', arg) for arg in args]
    args = [re.sub(r'^--remove_layers=.*', '--remove_layers=2-3', arg) for arg in args]
    args = [re.sub(r'^--num_remove=.*', '--num_remove=1', arg) for arg in args]
    args = [re.sub(r'^--ratio=.*', '--ratio=0.17,0.34', arg) for arg in args]
    args = [re.sub(r'^--train_steps=.*', '--train_steps=1', arg) for arg in args]
    if verb == 'prune' and not any(arg.startswith('--workdir') for arg in args):
      args.append(f'--workdir=runs/{number}')
    if verb == 'heal':
      args += [arg for arg in SHORT.split() if not re.match('--(protect|gate|score|train_steps)', arg)]
    elif plain and any(arg.startswith('--train_data') for arg in args):
      args = [arg for arg in args if not arg.startswith('--train_tokens')] + SHORT.split()
    if verb == 'speed':
      args += '--prompt_tokens=8 --new_tokens=2 --context=4 --batch_sizes=1 --repeats=1'.split()
    commands.main([verb, *args])  # ends the process where it fails
    ran.append(verb)
    assert capsys.readouterr().out, line
  assert {'prune', 'heal', 'plan', 'generate', 'speed', 'verify', 'report'} == set(ran)
  assert (here / 'runs/mine/export/config.json').is_file() and (here / 'runs/healed/export/README.md').is_file()


@pytest.mark.slow
def test_all_commands_of_the_quickstart_run_in_their_order(here, tiny_gguf, text, capsys):
  sizes = {
    'model': tiny_gguf,
    'like': tiny_gguf,
    'train_data': text,
    'eval_data': f'wikitext2={text}',
    'num_remove': 1,
    'train_tokens': 512,
    'seq_len': 32,
    'batch_size': 4,
    'grad_accum': 2,
    'lora_rank': 2,
    'validate_every': 2,
  }
  more = {
    'prune': '--eval_seq_len=32 --eval_tokens=256 --validation_sequences=4 --answer_tokens=4'.split(),
    'speed': '--prompt_tokens=8 --new_tokens=2 --context=4 --batch_sizes=1 --repeats=1'.split(),
    'generate': ['--max_new_tokens=4'],
  }
  ran = []
  for line in lines_of('docs/quickstart.md'):
    verb, *args = shlex.split(line)[1:]
    names = [arg[2:].partition('=')[0] for arg in args]
    args = [f'--{n}={sizes[n]}' if n in sizes and 'runs/' not in arg else arg for n, arg in zip(names, args)]
    commands.main([verb, *args, *more.get(verb, [])])  # ends the process where it fails
    ran.append(verb)
    assert capsys.readouterr().out, line
  assert {'plan', 'prune', 'report', 'verify', 'generate', 'speed', 'export-gguf'} == set(ran)
  assert (here / 'runs/8b/export/config.json').is_file() and (here / '8b.gguf').is_file()


@pytest.mark.parametrize('line', [*lines_of('README.md'), *lines_of('docs/quickstart.md')])
def test_every_command_has_the_flags_that_it_is_given(line, capsys):
  verb, *args = shlex.split(line)[1:]
  assert verb in commands.VERBS
  commands.run_verb(verb, ['--helpfull'])
  out = capsys.readouterr().out
  for name in (arg.partition('=')[0] for arg in args if arg.startswith('--')):
    assert name in out or f'--[no]{name[2:]}' in out, name
