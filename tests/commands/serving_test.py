"""docs/serving.md: its commands of elder_jax have the flags that they are given, and its Python is whole."""

import ast
import pathlib
import re
import shlex

import pytest

from elder_jax import commands
from elder_jax.run import usage

PAGE = (pathlib.Path(__file__).parents[2] / 'docs' / 'serving.md').read_text(encoding='utf-8')
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = [line for _, text in BLOCKS for line in text.splitlines() if line.startswith('elder_jax ')]


@pytest.mark.parametrize('line', COMMANDS)
def test_every_command_has_the_flags_that_it_is_given(line, capsys):
  verb, *args = shlex.split(line)[1:]
  commands.run_verb(verb, ['--helpfull'])
  out = capsys.readouterr().out
  for name in (arg.partition('=')[0][2:] for arg in args if arg.startswith('--')):
    assert f'--{name}' in out or f'--[no]{name}' in out, name


def test_the_page_and_the_card_give_the_same_commands():
  assert len(COMMANDS) == 2
  of_page = '\n'.join(text for _, text in BLOCKS)
  files = usage.NOTHING._replace(config={'model_type': 'llama'}, chat=True)
  of_card = '\n'.join(usage.section(files)).replace('FOLDER', 'runs/mine/export').replace('model.gguf', 'mine.gguf')
  [code] = re.findall(r'```python\n(.*?)```', of_card, re.DOTALL)
  assert code in of_page
  for command in ('python convert_hf_to_gguf.py runs/mine/export --outfile mine.gguf', 'llama-cli -m mine.gguf',
                  'vllm serve runs/mine/export', "echo 'FROM ./mine.gguf' > Modelfile"):  # fmt: skip
    assert command in of_card and command in of_page, command
  for language, text in BLOCKS:
    if language == 'python':
      ast.parse(text)


def test_lines_of_code_fit():
  assert max(len(line) for _, text in BLOCKS for line in text.splitlines()) <= 100
