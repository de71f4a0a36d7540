"""The command generate, and the ids that end a sequence."""

import pytest
from tiny import load
from tiny import write_tiny_llama

from elder_jax.commands import run_verb
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.text import data
from elder_jax.text.generation import eos_ids
from elder_jax.text.generation import generate


@pytest.fixture
def command(capsys):
  def run(*args):
    run_verb('generate', list(args))
    return capsys.readouterr().out

  return run


def test_the_command_prints_the_continuation(tiny, command):
  tokenizer = data.load_tokenizer(str(tiny))
  tokens = generate(load(tiny), [tokenizer('Once upon')['input_ids']], 9, eos_ids=(1,))[0]
  out = command(f'--model={tiny}', '--prompt=Once upon', '--max_new_tokens=9')
  assert out == tokenizer.decode(tokens, skip_special_tokens=True) + '\n'
  warm = ('--temperature=1.5', '--top_k=100', '--top_p=0.99', '--max_new_tokens=9', '--prompt=Once upon')
  drawn = [command(f'--model={tiny}', *warm, f'--seed={seed}') for seed in (1, 1, 2)]
  assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
  'args, parts',
  [
    ([], '--prompt=: is missing'),
    (['--prompt=Hello', '--model=missing_folder'], '--model=missing_folder'),
    (
      ['--prompt=Hello', '--max_new_tokens=252'],
      "prompt 0 has 5 tokens, which with --max_new_tokens=252 exceeds the model's 256",
    ),
    (['--prompt=Hello', '--top_p=2'], '--top_p=2.0'),
    (['--prompt=Hello', '--dtype=int8'], '--dtype'),
    (['--prompt=Hello', '--lenght=5'], 'lenght'),
  ],
)
def test_the_command_refuses_in_one_sentence(tiny, command, capsys, args, parts):
  with pytest.raises(SystemExit) as stop:
    command(*([] if any(arg.startswith('--model') for arg in args) else [f'--model={tiny}']), *args)
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert parts in error and error.startswith('elder_jax: ') and error.count('\n') == 1


def test_ids_that_end_a_sequence(tiny, tmp_path):
  source = open_source(str(tiny), tiny)
  assert eos_ids(source) == (1,)
  folder = write_tiny_llama(tmp_path, num_hidden_layers=1)
  source = open_source(str(folder), folder)
  for text, expected in (('{}', (1,)), ('{"eos_token_id": [1, 7]}', (1, 7)), ('{"eos_token_id": 9}', (9,))):
    (folder / 'generation_config.json').write_text(text)
    assert eos_ids(source) == expected
  (folder / 'generation_config.json').write_text('{"eos_token_id": "end"}')
  with pytest.raises(InputError, match="eos_token_id='end'"):
    eos_ids(source)
