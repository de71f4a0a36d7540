"""Generation against transformers' and against full forward passes; sampling; the command."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of
from tiny import write_tiny_llama

from elder_jax.commands import run_verb
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.run import pipeline
from elder_jax.text import data
from elder_jax.text import decoding as decoding_module
from elder_jax.text.decoding import Sampling
from elder_jax.text.decoding import decode_step
from elder_jax.text.decoding import prefill
from elder_jax.text.decoding import run_prompts
from elder_jax.text.decoding import sample
from elder_jax.text.decoding import truncate
from elder_jax.text.generation import eos_ids
from elder_jax.text.generation import generate
from elder_jax.text.generation import stream

GGUF = pathlib.Path('~/.cache/elder_jax/SmolLM2-135M-Instruct.Q4_1.gguf').expanduser()
LENGTHS = (1, 3, 7, 20, 33, 63, 64, 65)  # of prompts, about the border of the padding
ENGLISH = (
  'The capital of France is',
  'Once upon a time, there was a little girl who',
  'Water boils at',
  'In 1969, two men landed on the moon. Their names were',
  'def fibonacci(n):\n',
  'My favourite food is',
  'The difference between a cat and a dog is that',
  'List three reasons to read books:\n1.',
)


def load(folder) -> Decoder:
  return load_model(open_source(str(folder), folder), 'float32')


@pytest.fixture(scope='module')
def model(tiny) -> Decoder:
  return load(tiny)


@pytest.fixture(scope='module')
def prompts() -> list[list[int]]:
  draw = np.random.default_rng(0)
  return [draw.integers(2, 263, length).tolist() for length in LENGTHS]


def torch_greedy(folder, prompts, max_new_tokens) -> list[list[int]]:
  """transformers' new tokens, one prompt at a time, with the end-of-sequence token that may close them."""
  import torch
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  result = []
  for prompt in prompts:
    tokens = torch.tensor([prompt])
    more = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, do_sample=False)
    with torch.no_grad():
      result.append(model.generate(tokens, pad_token_id=0, **more)[0, len(prompt) :].tolist())
  return result


def cut(tokens: list[int], eos_ids) -> list[int]:
  return tokens[: next((i for i, token in enumerate(tokens) if token in eos_ids), None)]


def uncached(model, prompts, max_new_tokens, mode=Mode()) -> list[list[int]]:
  """The most probable token by a full forward pass for each."""
  rows_BT = np.zeros((len(prompts), max(map(len, prompts)) + max_new_tokens), np.int32)
  length_B = np.array([len(p) for p in prompts])
  for row_T, prompt in zip(rows_BT, prompts):
    row_T[: len(prompt)] = prompt
  logits = jax.jit(lambda m, t: logits_of(m, forward(m, t, mode=mode)[0]))
  rows_B = np.arange(len(prompts))
  for i in range(max_new_tokens):
    rows_BT[rows_B, length_B + i] = np.asarray(logits(model, rows_BT))[rows_B, length_B + i - 1].argmax(-1)
  return [row_T[n : n + max_new_tokens].tolist() for row_T, n in zip(rows_BT, length_B)]


def test_greedy_equals_transformers(tiny, model, prompts):
  expected = torch_greedy(tiny, prompts, 64)
  got = generate(model, prompts, 64, eos_ids=(1,))
  assert got == [cut(tokens, (1,)) for tokens in expected]
  assert len({tuple(tokens) for tokens in got}) == 8 and max(len(set(tokens)) for tokens in got) > 8


@pytest.mark.parametrize('config', [dict(num_key_value_heads=4), dict(tie_word_embeddings=False)])
def test_greedy_equals_transformers_without_shared_heads_and_without_a_tied_one(tmp_path, prompts, config):
  folder = write_tiny_llama(tmp_path, num_hidden_layers=2, **config)
  expected = torch_greedy(folder, prompts[1:4], 16)
  assert generate(load(folder), prompts[1:4], 16) == expected


def test_with_a_cache_as_without_for_any_batch(model, prompts):
  expected = uncached(model, prompts, 24)
  assert generate(model, prompts, 24) == expected
  for batch_size in (1, 3):  # 3: the last batch is filled up
    assert generate(model, prompts, 24, batch_size=batch_size) == expected
  assert generate(model, prompts, 5) == [tokens[:5] for tokens in expected]
  assert generate(model, prompts, 1) == [tokens[:1] for tokens in expected]


def test_logits_of_a_step_are_those_of_the_whole(model, prompts):
  tokens_T = np.array(prompts[-1], np.int32)
  x_BTD, _ = forward(model, tokens_T[None])
  whole_TV = logits_of(model, x_BTD)[0]
  # Two rows at different places of one text, the second padded by what must not be read.
  padded_BT = np.stack([tokens_T[:40], np.where(np.arange(40) < 9, tokens_T[:40], 200)])
  logits_BV, cache = prefill(model, padded_BT, np.array([40, 9]), 50)
  np.testing.assert_allclose(logits_BV, whole_TV[np.array([39, 8])], rtol=1e-4, atol=1e-4)
  assert cache.k_LBSKH.shape == cache.v_LBSKH.shape == (6, 2, 50, 2, 8)
  for i in range(10):
    position_B = np.array([40 + i, 9 + i])
    logits_BV, cache = decode_step(model, cache, tokens_T[position_B], position_B)
    np.testing.assert_allclose(logits_BV, whole_TV[position_B], rtol=1e-4, atol=1e-4)


def test_a_pruned_model_in_bfloat16(model, prompts):
  pruned, mode = pruning.prune(model, [1, 3]), Mode(dtype='bfloat16')
  logits_BV, cache = prefill(pruned, np.array([prompts[2]]), np.array([7]), 16, mode)
  assert cache.k_LBSKH.dtype == cache.v_LBSKH.dtype == jnp.bfloat16 and cache.k_LBSKH.shape[0] == 4
  assert logits_BV.dtype == jnp.float32
  assert generate(pruned, prompts, 4) == uncached(pruned, prompts, 4)

  def first(rows):
    return [row[0] for row in rows]

  assert first(generate(pruned, prompts, 4, mode=mode)) == first(uncached(pruned, prompts, 1, mode))


def test_gates_are_taken_as_1(model, prompts):
  closed = pruning.with_gates(model, 0.5)
  assert generate(closed, prompts[:2], 4) == generate(model, prompts[:2], 4)


def test_any_of_several_ids_ends_a_sequence(model, prompts):
  whole = generate(model, prompts, 24)
  ends = (whole[0][0], whole[1][5], whole[2][23])
  got = generate(model, prompts, 24, eos_ids=ends)
  assert got == [cut(tokens, ends) for tokens in whole] and got[0] == []
  assert len({len(tokens) for tokens in got}) > 2


def test_the_loop_stops_with_the_last_row(model, prompts, monkeypatch):
  whole = generate(model, prompts[3:5], 24)
  steps = []

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return decode_step(*args)

  monkeypatch.setattr(decoding_module, 'decode_step', counted)
  monkeypatch.setattr(
    decoding_module,
    'run_prompts',
    jax.jit(run_prompts.__wrapped__, static_argnames=('capacity', 'room', 'sampling', 'mode')),
  )
  last = max(tokens.index(tokens[6]) for tokens in whole)
  generate(model, prompts[3:5], 24, eos_ids=tuple(tokens[6] for tokens in whole), batch_size=2)
  jax.effects_barrier()
  assert 1 <= len(steps) <= last


def test_no_temperature_and_one_token_are_greedy(model, prompts):
  greedy = generate(model, prompts, 12)
  for sampling in (Sampling(1e-5), Sampling(1e-7), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6)):
    assert generate(model, prompts, 12, sampling=sampling, seed=3) == greedy, sampling


def test_a_seed_gives_the_same_tokens_in_any_batch(model, prompts):
  def draw(rows, **more):
    return generate(model, rows, 12, sampling=Sampling(1.5, 50, 0.95), **more)

  all_together = draw(prompts, seed=1)
  assert draw(prompts, seed=1) == all_together
  assert draw(prompts, seed=1, batch_size=3) == all_together
  for i in range(1, 4):
    assert draw(prompts[:i], seed=1) == all_together[:i]
  assert draw([*prompts[:3], prompts[0]], seed=1)[:3] == all_together[:3]
  others = draw(prompts, seed=2)
  assert all(a != b for a, b in zip(all_together, others))
  twice = draw([prompts[0]] * 2, seed=1)
  assert twice[0] != twice[1] and twice[0] == all_together[0]


# Probabilities 0.4, 0.3, 0.2, 0.1, in an order that is not theirs.
P_V = np.array([0.2, 0.4, 0.1, 0.3])


@pytest.mark.parametrize(
  'top_k, top_p, kept',
  [
    (0, 1.0, {0, 1, 2, 3}),
    (2, 1.0, {1, 3}),
    (9, 1.0, {0, 1, 2, 3}),
    (0, 0.3, {1}),
    (0, 0.39, {1}),
    (0, 0.41, {1, 3}),
    (0, 0.69, {1, 3}),
    (0, 0.71, {0, 1, 3}),
    (0, 0.91, {0, 1, 2, 3}),
    (0, 1e-9, {1}),
    (2, 0.56, {1}),  # of what top_k leaves, 4/7 and 3/7
    (2, 0.6, {1, 3}),
  ],
)
def test_truncation_of_known_probabilities(top_k, top_p, kept):
  logits_BV = np.log(np.stack([P_V, P_V[::-1]])).astype(np.float32)
  out_BV = np.asarray(jax.jit(truncate, static_argnums=(1, 2))(logits_BV, top_k, top_p))
  assert set(np.flatnonzero(np.isfinite(out_BV[0]))) == kept
  assert set(np.flatnonzero(np.isfinite(out_BV[1]))) == {3 - v for v in kept}
  np.testing.assert_array_equal(out_BV[np.isfinite(out_BV)], logits_BV[np.isfinite(out_BV)])


@pytest.mark.parametrize('top_k, top_p', [(0, 0.9), (7, 1.0), (20, 0.5)])
def test_truncation_equals_transformers(top_k, top_p):
  import torch
  import transformers

  logits_BV = 3 * np.random.default_rng(0).standard_normal((16, 100), np.float32)
  expected = torch.tensor(logits_BV)
  if top_k:
    expected = transformers.TopKLogitsWarper(top_k)(None, expected)
  if top_p < 1:
    expected = transformers.TopPLogitsWarper(top_p)(None, expected)
  np.testing.assert_array_equal(truncate(logits_BV, top_k, top_p), expected.numpy())


@pytest.mark.parametrize(
  'sampling, expected_V',
  [
    (Sampling(1.0), P_V),
    (Sampling(0.5), P_V**2 / (P_V**2).sum()),
    (Sampling(1.0, top_p=0.6), np.array([0, 4, 0, 3]) / 7),
    (Sampling(1.0, top_k=3), np.array([2, 4, 0, 3]) / 9),
  ],
)
def test_tokens_are_drawn_with_their_probabilities(sampling, expected_V):
  n = 20_000
  logits_BV = np.tile(np.log(P_V).astype(np.float32) + 5, (n, 1))
  token_B = jax.jit(sample, static_argnums=2)(logits_BV, jax.random.split(jax.random.key(0), n), sampling)
  share_V = np.bincount(token_B, minlength=4) / n
  np.testing.assert_allclose(share_V, expected_V, atol=0.015)  # four standard deviations
  assert (share_V[expected_V == 0] == 0).all()


def test_what_does_not_fit_is_refused(model, prompts):
  with pytest.raises(InputError, match='prompt 7 has 65 tokens.*--max_new_tokens=16.*80'):
    generate(model, prompts, 16, capacity=80)
  assert len(generate(model, prompts, 15, capacity=80)) == 8
  with pytest.raises(ValueError, match='65.*64'):
    prefill(model, np.array(prompts[-1:]), np.array([65]), 64)


@pytest.mark.parametrize(
  'rows, more, message',
  [
    ([[2], []], {}, 'prompt 1 has no tokens'),
    ([[2, 263]], {}, 'prompt 0 has the token 263, the model has 263'),
    ([[-1]], {}, 'the token -1'),
    ([[2]], dict(max_new_tokens=0), '--max_new_tokens=0'),
    ([[2]], dict(batch_size=0), '--batch_size=0'),
    ([[2]], dict(sampling=Sampling(-1.0)), '--temperature=-1.0'),
    ([[2]], dict(sampling=Sampling(float('nan'))), '--temperature=nan'),
    ([[2]], dict(sampling=Sampling(1.0, -1)), '--top_k=-1'),
    ([[2]], dict(sampling=Sampling(1.0, 0, 0.0)), '--top_p=0.0'),
    ([[2]], dict(sampling=Sampling(1.0, 0, 1.5)), '--top_p=1.5'),
  ],
)
def test_bad_input(model, rows, more, message):
  with pytest.raises(InputError, match=re.escape(message.removeprefix('--'))):
    generate(model, rows, **{'max_new_tokens': 4, **more})


def test_a_stream_is_what_generate_gives(model, prompts):
  for i, prompt in enumerate(prompts[:3]):
    expected = generate(model, [prompt], 12, eos_ids=(1,))[0]
    assert list(stream(model, prompt, 12, eos_ids=(1,))) == expected, i
  warm = dict(sampling=Sampling(1.5, 100, 0.99), seed=3)
  assert list(stream(model, prompts[0], 9, **warm)) == generate(model, [prompts[0]], 9, **warm)[0]


def test_no_prompts_no_tokens(model):
  assert generate(model, [], 4) == []


# ---- the command ----


@pytest.fixture
def command(capsys):
  def run(*args):
    run_verb('generate', list(args))
    return capsys.readouterr().out

  return run


def test_the_command_prints_what_follows(tiny, model, command):
  tokenizer = data.load_tokenizer(str(tiny))
  tokens = generate(model, [tokenizer('Once upon')['input_ids']], 9, eos_ids=(1,))[0]
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
    (['--prompt=Hello', '--max_new_tokens=252'], 'prompt 0 has 5 tokens, with --max_new_tokens=252 more than the 256'),
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


# ---- the real model ----


@pytest.mark.slow
@pytest.mark.usefixtures('whole_compiler')
def test_smollm2_pruned_writes_what_transformers_writes(tmp_path):
  """8 prompts, 64 tokens each, from an export without two of the 30 layers."""
  pipeline.run(
    config_of(model=str(GGUF), workdir=str(tmp_path), remove_layers='14,17', recipe='none', compare=(), verify='jax')
  )
  folder = tmp_path / 'export'
  tokenizer = data.load_tokenizer(str(folder))
  prompts = [tokenizer(text)['input_ids'] for text in ENGLISH]
  source = open_source(str(folder), folder)
  ends = eos_ids(source)
  got = generate(load_model(source, 'float32'), prompts, 64, eos_ids=ends)
  assert got == [cut(tokens, ends) for tokens in torch_greedy(folder, prompts, 64)]
  assert sum(map(len, got)) > 300 and 'Paris' in tokenizer.decode(got[0])
