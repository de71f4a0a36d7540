"""What generate, eval, speed and verify refuse: bad flags, texts that are too long, logits that are not finite."""

import pathlib

from ending import one_sentence
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tiny as tiny_lib

from elder_jax.commands import evaluate
from elder_jax.commands import generate as generate_command
from elder_jax.errors import InputError
from elder_jax.hf.source import open_source
from elder_jax.run import timing
from elder_jax.text.decoding import NOT_FINITE
from elder_jax.text.generation import generate

QUICK = ('--prompt_tokens=24', '--new_tokens=3', '--context=5', '--batch_sizes=1', '--repeats=1')


# ---- bad input ----


@pytest.mark.parametrize(
  'verb, args, part',
  [
    ('generate', [], '--prompt=: is missing'),
    ('generate', ['--prompt', 'caf\udce9'], '--prompt=caf\\udce9: contains bytes that are not UTF-8'),
    ('generate', ['caf\udce9'], 'caf\\udce9: contains bytes'),
    ('generate', ['--prompt=a', '--max_new_tokens=0'], '--max_new_tokens=0'),
    ('generate', ['--prompt=a', f'--max_new_tokens={2**31}'], f'--max_new_tokens={2**31}'),
    ('generate', ['--prompt=a', '--seed=' + '9' * 30], '--seed=999'),
    ('generate', ['--prompt=a', '--seed=' + '9' * 5000], '--seed=999'),
    ('generate', ['--prompt=a', '--tokenizer=/nowhere'], '--tokenizer=/nowhere: there is no such folder'),
    ('generate', ['--prompt=' + 'a' * 5000], 'prompt 0 has 5000 tokens'),
    ('generate', ['--prompt'], 'Missing value for flag --prompt'),
    ('speed', [], 'give either --pruned'),
    ('speed', ['--remove_layers=1'], '--prompt_tokens=2048'),
    ('speed', ['--remove_layers=1', *QUICK[1:], '--prompt_tokens=257'], '--prompt_tokens=257'),
    ('speed', ['--remove_layers=1', *QUICK[:1], '--context=250', '--new_tokens=7'], '--context=250 and --new_tokens=7'),
    ('speed', ['--remove_layers=1', '--batch_sizes=1,x'], '--batch_sizes=1,x'),
    ('speed', ['--remove_layers=1', '--batch_sizes=²'], '--batch_sizes=²'),
    ('speed', ['--remove_layers=1', '--batch_sizes=' + '9' * 5000], '--batch_sizes=999'),
    ('speed', ['--remove_layers=1', f'--batch_sizes={10**30}'], '--batch_sizes=1000'),
    ('speed', ['--remove_layers=1', '--out=/dev/null'], '--out=/dev/null: is not a file'),
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
def test_a_folder_that_does_not_exist(command, folder):
  one_sentence(command('verify', folder), 2, 'there is no such folder')


def test_a_damaged_export_exits_with_1(command, tiny, tmp_path):
  one_sentence(command('verify', tiny), 1, 'has no readable SHA256SUMS')


# ---- models ----


@pytest.fixture(scope='module', params=['GPT2', 'OPT'])
def learned(request, tmp_path_factory) -> pathlib.Path:
  """A model with 100 learned positions."""
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


def test_learned_positions_limit_the_length(command, learned, monkeypatch):
  for module in (generate_command, evaluate, timing):
    monkeypatch.setattr(module, 'load_model', lambda *args: pytest.fail('weights were read'))
  text = 'one two three four five six seven eight nine ten ' * 2  # 98 tokens
  args = f'--model={learned}', f'--prompt={text}', '--max_new_tokens=3'
  one_sentence(command('generate', *args), 2, 'prompt 0 has 98 tokens', "the model's 100 positions")
  args = f'--model={learned}', '--remove_layers=1', '--new_tokens=8'
  one_sentence(command('speed', *args), 2, '--prompt_tokens=2048', 'has 100 positions')
  one_sentence(command('speed', *args, '--prompt_tokens=8', '--context=93'), 2, '--context=93 and --new_tokens=8')


@pytest.mark.filterwarnings('ignore')  # of transformers
def test_padding_beyond_the_positions_changes_nothing(learned):
  import torch
  import transformers

  prompt = [5 + i % 250 for i in range(70)]  # padded to 128
  model = tiny_lib.load(learned)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(learned)
  expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, eos_token_id=None, do_sample=False)[0, 70:]
  assert generate(model, [prompt], 30, capacity=100) == [expected.tolist()]


def test_nan_at_a_later_token_is_refused(learned):
  model = tiny_lib.load(learned)
  prompts = [[5 + i % 250 for i in range(length)] for length in (64, 50)]  # the longer one is not padded
  offset = model.spec.position_offset
  model.positions.set_value(model.positions[...].at[offset + 75].set(float('nan')))
  assert [len(new) for new in generate(model, prompts, 12)] == [12, 12]
  with pytest.raises(InputError, match='not finite at token 76 of prompt 0;'):  # the one after position 75
    generate(model, prompts, 13)


def test_logits_that_are_not_finite_are_detected(tiny, monkeypatch):
  source, prompt_BT = open_source(str(tiny), tiny), np.zeros((1, 8), np.int32)
  (model, _), _ = timing._in_jax(source, None, [2], 'float32')
  assert model.generate(prompt_BT, 2)()
  monkeypatch.setattr(timing, 'run_prompts', lambda *args, **kwargs: jnp.array([[5, NOT_FINITE]]))
  assert not model.generate(prompt_BT, 2)()


def overflow(folder: pathlib.Path):
  """Changes the model so that all weights are finite, but no logit is."""
  path = folder / 'model.safetensors'
  tensors = safetensors_numpy.load_file(path)
  tensors['model.norm.weight'][:] = 3e38
  safetensors_numpy.save_file(tensors, path, metadata={'format': 'pt'})


@pytest.mark.parametrize('sampling', [(), ('--temperature=1',)])
def test_nan_is_not_decoded(command, model, sampling):
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
def test_any_error_of_transformers_is_one_sentence(command, tiny, tmp_path, monkeypatch):
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
      'elder_jax: --torch=true: transformers cannot run a model (index out of range in self); leave the flag out.\n'
    )
