"""The small commands end in one sentence and with an exit status, whatever they are given: never with a traceback."""

import dataclasses
import errno
import importlib
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tiny as tiny_lib

import elder_jax
from elder_jax import commands
from elder_jax.commands import evaluate
from elder_jax.commands import generate as generate_command
from elder_jax.commands.command import TRACEBACK
from elder_jax.commands.command import Command
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.run import timing
from elder_jax.run.config import all_fields
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text.decoding import NOT_FINITE
from elder_jax.text.generation import generate

REPO = pathlib.Path(__file__).resolve().parents[2]
QUICK = ('--prompt_tokens=24', '--new_tokens=3', '--context=5', '--batch_sizes=1', '--repeats=1')


@pytest.fixture
def command(capsys):
  """Runs a verb, or a Command, in this process: (exit status, stdout, stderr without progress)."""

  def run(what, *args):
    status = 0
    try:
      if isinstance(what, Command):
        what.main([str(a) for a in args])
      else:
        commands.run_verb(what, [str(a) for a in args])
    except SystemExit as e:
      status = e.code
    out, err = capsys.readouterr()
    return status, out, err

  return run


def raising(error: BaseException) -> Command:
  def run(parsed):
    raise error

  return Command('raising', 'Raises.', run)


def one_sentence(ended, status: int, *parts):
  """The command ended with that status, and its last words are one sentence that holds all `parts`."""
  assert ended[0] == status, ended
  assert 'Traceback' not in ended[2] and ended[2].endswith('\n'), ended[2]
  *progress, last = ended[2].splitlines()
  assert all(line.startswith('elder_jax: loading') for line in progress), ended[2]
  assert last.startswith('elder_jax: ') and len(last) < 1100, last
  for part in parts:
    assert part in last, last


# ---- how a command ends ----


@pytest.mark.parametrize(
  'error, status, parts',
  [
    (InputError('x', 1, 'is\nwrong.'), 2, ['--x=1: is\\nwrong.']),
    (InputError('x' * 9000 + ' end.'), 2, ['xxx … xxx', 'end.']),
    (KeyboardInterrupt(), 130, ['stopped by Ctrl-C']),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, ['the disk is full']),
    (ValueError(f'FAILED_PRECONDITION: {os.strerror(errno.ENOSPC)}'), 1, ['the disk is full']),
    (PermissionError(errno.EACCES, 'Permission denied', '/a/b'), 2, ['/a/b: Permission denied']),
    (MemoryError('Unable to allocate 3 TiB'), 3, ['not enough memory (Unable to allocate 3 TiB)']),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory\n(allocator)'), 3, ['not enough memory']),
    (KeyError('acc'), 1, ["KeyError: 'acc'", 'a fault of elder_jax', 'ELDER_JAX_TRACEBACK=1']),
    (RuntimeError('two\nlines'), 1, ['RuntimeError: two lines;', 'report it']),
    (RecursionError(), 1, ['RecursionError: RecursionError']),
  ],
  ids=lambda v: type(v).__name__,
)
def test_whatever_is_raised_ends_in_one_sentence(command, error, status, parts):
  one_sentence(command(raising(error)), status, *parts)


def test_a_traceback_is_had_for_the_asking(command, monkeypatch):
  monkeypatch.setenv(TRACEBACK, '1')
  status, _, err = command(raising(KeyError('acc')))
  assert status == 1 and 'in run\n' in err and err.splitlines()[-1].startswith('elder_jax: KeyError')


def process(*args, stdout=subprocess.PIPE):
  env = {**os.environ, 'PYTHONPATH': str(REPO), 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
  command = [sys.executable, '-m', 'elder_jax', *args]
  result = subprocess.run(command, env=env, stdout=stdout, stderr=subprocess.PIPE, timeout=120)
  return result.returncode, (result.stdout or b'').decode(), result.stderr.decode()


def test_a_process_is_given_bytes_that_are_not_utf8():
  one_sentence(process('generate', '--model=x', b'--prompt=caf\xe9'), 2, '--prompt=caf\\udce9: holds bytes')


def test_a_process_whose_output_nobody_reads_ends_quietly():
  read, write = os.pipe()
  os.close(read)
  assert process('speed', '--helpfull', stdout=write) == (141, '', '')
  os.close(write)


def test_a_process_whose_output_has_no_room():
  with open('/dev/full', 'w') as full:
    one_sentence(process('verify', '--help', stdout=full), 1, 'the disk is full')


# ---- help ----


@pytest.mark.parametrize('verb', commands.VERBS)
@pytest.mark.parametrize('flag', ['--help', '-h', '--helpfull', '-help'])
def test_help(command, verb, flag):
  status, out, err = command(verb, '--model=x', flag)
  module = importlib.import_module(f'elder_jax.commands.{commands.VERBS[verb][0]}')
  lines = out.splitlines()
  assert (status, err) == (0, '') and lines[0] == module.COMMAND.summary and f'usage: elder_jax {verb}' in out
  assert len(lines) > 3 and 'elder_jax ' in lines[3]  # an example
  if flag != '--helpfull':
    assert len(lines) <= 100 and max(map(len, lines)) <= 120, len(lines)
  for foreign in ('undefok', 'alsologtostderr', 'pdb', 'orbax'):
    assert foreign not in out


def test_help_of_a_process():
  """Imports bring flags of absl and warnings of their own only where the process is new."""
  status, out, err = process('prune', '--helpfull')
  assert (status, err) == (0, '') and '--num_remove' in out
  assert not {'undefok', 'alsologtostderr', 'pdb', 'orbax'} & set(re.findall(r'\w+', out))


def test_help_names_every_flag(command):
  short, full = command('prune', '--help')[1], command('prune', '--helpfull')[1]
  for name, field in all_fields().items():
    assert re.search(rf'--(\[no\])?{name}\b', short) and field.metadata['help'] in full, name


def test_the_overview(capsys):
  for args in ([], ['--help'], ['-h'], ['help']):
    commands.main(args)
    out = capsys.readouterr().out
    assert all(f'  {verb}' in out for verb in commands.VERBS) and len(out.splitlines()) < 25
  commands.main(['--version'])
  assert capsys.readouterr().out == f'elder_jax {elder_jax.__version__}\n'


@pytest.mark.parametrize(
  'args, told',
  [
    (['prun'], 'there is no such verb; did you mean prune?'),
    (['zero_shot'], 'there is no such verb; these are: prune, '),
    (['--model=x'], 'give a verb first, as in elder_jax prune'),
    (['prune', '--num_remov=3'], "there is no such flag ('num_remov'); did you mean --num_remove?"),
    (['heal', '--num_remove=3'], '--num_remove=3: heal removes no layers'),
  ],
)
def test_did_you_mean(args, told, capsys):
  with pytest.raises(SystemExit) as caught:
    commands.main(args)
  err = capsys.readouterr().err
  assert caught.value.code == 2 and told in err and err.count('\n') == 1, err


@pytest.mark.parametrize('verb, operand', [('verify', 'FOLDER'), ('report', 'RUN')])
def test_a_command_of_operands(command, verb, operand):
  one_sentence(command(verb), 2, operand)
  one_sentence(command(verb, '/nowhere'), 2, 'there is no such')
  one_sentence(command('verify', 'a', 'b'), 2, 'give one FOLDER')


# ---- bad input ----


@pytest.mark.parametrize(
  'verb, args, part',
  [
    ('generate', [], '--prompt=: is missing'),
    ('generate', ['--prompt', 'caf\udce9'], '--prompt=caf\\udce9: holds bytes that are not UTF-8'),
    ('generate', ['caf\udce9'], 'caf\\udce9: holds bytes'),
    ('generate', ['--prompt=a', '--max_new_tokens=0'], '--max_new_tokens=0'),
    ('generate', ['--prompt=a', f'--max_new_tokens={2**31}'], f'--max_new_tokens={2**31}'),
    ('generate', ['--prompt=a', '--seed=' + '9' * 30], '--seed=999'),
    ('generate', ['--prompt=a', '--seed=' + '9' * 5000], '--seed=999'),
    ('generate', ['--prompt=a', '--tokenizer=/nowhere'], '--tokenizer=/nowhere: there is no such folder'),
    ('generate', ['--prompt=' + 'a' * 5000], 'prompt 0 has 5000 tokens'),
    ('generate', ['--prompt'], 'Missing value for flag --prompt'),
    ('speed', [], '--pruned or --remove_layers'),
    ('speed', ['--remove_layers=1'], '--prompt_tokens=2048'),
    ('speed', ['--remove_layers=1', *QUICK[1:], '--prompt_tokens=257'], '--prompt_tokens=257'),
    ('speed', ['--remove_layers=1', *QUICK[:1], '--context=250', '--new_tokens=7'], '--context=250 and --new_tokens=7'),
    ('speed', ['--remove_layers=1', '--batch_sizes=1,x'], '--batch_sizes=1,x'),
    ('speed', ['--remove_layers=1', '--batch_sizes=²'], '--batch_sizes=²'),
    ('speed', ['--remove_layers=1', '--batch_sizes=' + '9' * 5000], '--batch_sizes=999'),
    ('speed', ['--remove_layers=1', f'--batch_sizes={10**30}'], '--batch_sizes=1000'),
    ('speed', ['--remove_layers=1', '--out=/dev/null'], '--out=/dev/null: is no file'),
    ('speed', ['--remove_layers=1', '--out=/proc/x'], '--out=/proc/x: cannot be written'),
    ('speed', ['--remove_layers=1', '--out=' + 'x' * 300], 'cannot be written'),
    ('speed', ['--torch', '--pruned=a.GGUF'], '--torch=true: reads Hugging Face folders only'),
    ('eval', ['--batch_size=0'], '--batch_size=0'),
    ('eval', ['--out=/proc/x'], '--out=/proc/x: cannot be written'),
    ('eval', ['--mesh=x'], '--mesh=x'),
  ],
)
def test_bad_input(command, tiny, monkeypatch, verb, args, part):
  for module in (generate_command, evaluate, timing):
    monkeypatch.setattr(module, 'load_model', lambda *args: pytest.fail('weights were read'))
  one_sentence(command(verb, f'--model={tiny}', *args), 2, part)


@pytest.mark.parametrize('folder', ['/nowhere', '/dev/null', 'x' * 5000])
def test_a_folder_that_is_none(command, folder):
  one_sentence(command('verify', folder), 2, 'there is no such folder')


def test_an_export_that_is_damaged_has_its_own_status(command, tiny, tmp_path):
  one_sentence(command('verify', tiny), 1, 'has no readable SHA256SUMS')


# ---- flags ----


@dataclasses.dataclass(frozen=True)
class Flags(Settings):
  prompt: str = setting('', 'A text.')
  seed: int = setting(0, 'A number.')
  max_new_tokens: int = setting(64, 'Another.')
  cache: bool = setting(True, 'A boolean.')
  data: dict[str, str] = setting({}, 'Repeatable.')
  layers: tuple[int, ...] = setting((), 'Numbers.')


def parsed(command, *args):
  found = {}
  ended = command(Command('flags', 'Flags.', lambda parsed: found.update(parsed.settings), {'All': Flags}), *args)
  return ended if ended[0] else dataclasses.asdict(Flags(**found))


@pytest.mark.parametrize(
  'args, values',
  [
    (['--max-new-tokens=3'], dict(max_new_tokens=3)),
    (['-max_new_tokens', '3'], dict(max_new_tokens=3)),
    (['--prompt', '--seed=3'], dict(prompt='--seed=3', seed=0)),
    (['--prompt=a=b\n--seed=3'], dict(prompt='a=b\n--seed=3', seed=0)),
    (['--nocache'], dict(cache=False)),
    (['--no-cache'], dict(cache=False)),
    (['--cache', '--seed=1'], dict(cache=True, seed=1)),
    (['--seed=3', '--seed', '3'], dict(seed=3)),
    (['--data=a=x', '--data=b=y'], dict(data={'a': 'x', 'b': 'y'})),
    (['--data=a=x', '--data=', '--data=b=y'], dict(data={'b': 'y'})),
    (['--layers=3,12-14'], dict(layers=(3, 12, 13, 14))),
    (['--layers='], dict(layers=())),
    (['--flagfile={tmp}/windows.flags'], dict(prompt='é b', seed=5)),
    (['--flagfile', '{tmp}/windows.flags', '--seed=6'], dict(seed=6)),
    (['--seed=6', '--flagfile={tmp}/nested.flags'], dict(seed=5, max_new_tokens=2)),
    (['--undefok=later', '--later=1', '--seed=2'], dict(seed=2)),
  ],
)
def test_flags(command, tmp_path, args, values):
  (tmp_path / 'windows.flags').write_bytes('\ufeff# Windows\r\n\r\n--prompt=é b\r\n--seed=5\r\n'.encode())
  (tmp_path / 'nested.flags').write_text(f'--seed=4\n--max-new-tokens=2\n--flagfile={tmp_path}/windows.flags\n')
  found = parsed(command, *(arg.format(tmp=tmp_path) for arg in args))
  assert values.items() <= found.items()


@pytest.mark.parametrize(
  'args, parts',
  [
    (['--seed=1', '--prompt=a', '--seed=2'], ["--seed: is given twice, as '1' and '2'"]),
    (['--max_new_tokens=1', '--max-new-tokens', '2'], ['--max_new_tokens: is given twice']),
    (['--cache', '--nocache'], ["--cache: is given twice, as 'true' and 'false'"]),
    (['--flagfile={tmp}/twice.flags', '--seed=3'], ['--seed: is given twice in {tmp}/twice.flags']),
    (['--nocache=1'], ['--nocache=1 does not take an argument']),
    (['--flagfile={tmp}/utf16.flags'], ['--flagfile={tmp}/utf16.flags: is not a UTF-8 text file']),
    (['--flagfile={tmp}/nul.flags'], ['nul.flags: is not a UTF-8 text file']),
    (['--flagfile={tmp}/itself.flags'], ['itself.flags: includes itself']),
    (['--flagfile={tmp}'], ['--flagfile={tmp}: cannot be read']),
    (['--flagfile'], ['Missing value for flag --flagfile']),
    (['--promt=x'], ["'promt'", 'prompt']),
    (['--seed=1\n2'], ['--seed=1']),
    (['--layers=5-3'], ['--layers=5-3', 'no range']),
    (['--data=a'], ['--data=a', 'name=source']),
    (['--seed=x'], ['--seed=x', 'whole numbers']),
  ],
)
def test_flags_that_are_refused(command, tmp_path, args, parts):
  (tmp_path / 'twice.flags').write_text('--seed=1\n--seed=2\n')
  (tmp_path / 'utf16.flags').write_bytes('\ufeff--seed=1\r\n'.encode('utf-16-le'))
  (tmp_path / 'nul.flags').write_bytes(b'--prompt=a\0b\n')
  (tmp_path / 'itself.flags').write_text(f'--flagfile={tmp_path}/./itself.flags\n')
  ended = parsed(command, *(arg.format(tmp=tmp_path) for arg in args))
  one_sentence(ended, 2, *(part.format(tmp=tmp_path) for part in parts))


# ---- models ----


@pytest.fixture(scope='module', params=['GPT2', 'OPT'])
def learned(request, tmp_path_factory) -> pathlib.Path:
  """A model of 100 learned positions."""
  import torch
  import transformers

  torch.manual_seed(0)
  opt = dict(ffn_dim=48, num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=100, init_std=0.2)
  sizes = {
    'GPT2': dict(n_embd=32, n_head=4, n_layer=4, n_positions=100, initializer_range=0.2),
    'OPT': dict(hidden_size=32, word_embed_proj_dim=32, **opt),
  }[request.param]
  config = getattr(transformers, f'{request.param}Config')(vocab_size=263, bos_token_id=0, eos_token_id=1, **sizes)
  folder = tmp_path_factory.mktemp(request.param)
  transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
  tiny_lib.write_tokenizer(folder)
  return folder


def test_learned_positions_are_a_limit(command, learned, monkeypatch):
  for module in (generate_command, evaluate, timing):
    monkeypatch.setattr(module, 'load_model', lambda *args: pytest.fail('weights were read'))
  text = 'one two three four five six seven eight nine ten ' * 2  # 98 tokens
  args = f'--model={learned}', f'--prompt={text}', '--max_new_tokens=3'
  one_sentence(command('generate', *args), 2, 'prompt 0 has 98 tokens', 'the 100 positions')
  args = f'--model={learned}', '--remove_layers=1', '--new_tokens=8'
  one_sentence(command('speed', *args), 2, '--prompt_tokens=2048', 'has 100 positions')
  one_sentence(command('speed', *args, '--prompt_tokens=8', '--context=93'), 2, '--context=93 and --new_tokens=8')


@pytest.mark.filterwarnings('ignore')  # of transformers
def test_padding_beyond_the_positions_changes_nothing(learned):
  import torch
  import transformers

  prompt = [5 + i % 250 for i in range(70)]  # padded to 128
  model = load_model(open_source(str(learned), learned), 'float32')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(learned)
  expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, eos_token_id=None, do_sample=False)[0, 70:]
  assert generate(model, [prompt], 30, capacity=100) == [expected.tolist()]


def test_nan_at_a_later_token_is_no_text(learned):
  model = load_model(open_source(str(learned), learned), 'float32')
  prompts = [[5 + i % 250 for i in range(length)] for length in (64, 50)]  # the longer is not padded
  offset = model.spec.position_offset
  model.positions.set_value(model.positions[...].at[offset + 75].set(float('nan')))
  assert [len(new) for new in generate(model, prompts, 12)] == [12, 12]
  with pytest.raises(InputError, match='not finite at token 76 of prompt 0;'):  # the one after position 75
    generate(model, prompts, 13)


def test_tokens_that_are_none_are_not_timed(tiny, monkeypatch):
  source, prompt_BT = open_source(str(tiny), tiny), np.zeros((1, 8), np.int32)
  (model, _), _ = timing._in_jax(source, None, [2], 'float32')
  assert model.generate(prompt_BT, 2)()
  monkeypatch.setattr(timing, 'run_prompts', lambda *args, **kwargs: jnp.array([[5, NOT_FINITE]]))
  assert not model.generate(prompt_BT, 2)()


def overflow(folder: pathlib.Path):
  """All weights are finite, no logit is."""
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  tensors['model.norm.weight'][:] = 3e38
  safetensors_numpy.save_file(tensors, path, metadata={'format': 'pt'})


@pytest.mark.parametrize('sampling', [(), ('--temperature=1',)])
def test_nan_is_no_text(command, model, sampling):
  overflow(model)
  ended = command('generate', f'--model={model}', '--prompt=Hello', *sampling)
  assert ended[1] == ''
  one_sentence(ended, 2, 'logits are not finite at token 5 of prompt 0', '--dtype=float32')


@pytest.mark.parametrize('torch', [False, True])
@pytest.mark.parametrize('flag', ['model', 'pruned'])
@pytest.mark.filterwarnings('ignore')  # of transformers
def test_nan_is_not_timed(model, tmp_path, flag, torch):
  folders = dict(model=model, pruned=tiny_lib.write_tiny_llama(tmp_path / 'fewer', num_hidden_layers=3))
  overflow(folders[flag])
  quick = dict(prompt_tokens=24, new_tokens=3, context=5, batch_sizes=(1,), repeats=1)
  with pytest.raises(InputError, match=f'{flag}={folders[flag]}: the logits are not finite'):
    settings = timing.SpeedSettings(torch=torch, **{name: str(folder) for name, folder in folders.items()}, **quick)
    timing.measure(settings, lambda: pytest.fail('it was timed'))


@pytest.mark.filterwarnings('ignore')  # of transformers
def test_whatever_transformers_raises_is_one_sentence(command, tiny, tmp_path, monkeypatch):
  import transformers

  fewer = tiny_lib.write_tiny_llama(tmp_path / 'fewer', num_hidden_layers=3)

  def fails(*args, **kwargs):
    raise IndexError('index out of range\nin self')

  for owner, name in (
    (transformers.LlamaForCausalLM, 'forward'),
    (transformers.AutoModelForCausalLM, 'from_pretrained'),
  ):
    monkeypatch.setattr(owner, name, fails)
    ended = command('speed', '--torch', f'--model={tiny}', f'--pruned={fewer}', *QUICK)
    assert ended[0] == 2 and ended[2].endswith(
      'elder_jax: --torch=true: transformers cannot run a model (index out of range in self); leave the flag away.\n'
    )
