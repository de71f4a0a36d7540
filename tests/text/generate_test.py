"""Generation against transformers and against full forward passes, for any batch."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_of
from tiny import load
from tiny import write_tiny_llama

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
from elder_jax.text.generation import eos_ids
from elder_jax.text.generation import generate
from elder_jax.text.generation import stream

GGUF = pathlib.Path('~/.cache/elder_jax/SmolLM2-135M-Instruct.Q4_1.gguf').expanduser()
LENGTHS = (1, 3, 7, 20, 33, 63, 64, 65)  # of prompts, up to and around the padded length of 64
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


@pytest.fixture(scope='module')
def model(tiny) -> Decoder:
  return load(tiny)


@pytest.fixture(scope='module')
def prompts() -> list[list[int]]:
  draw = np.random.default_rng(0)
  return [draw.integers(2, 263, length).tolist() for length in LENGTHS]


def torch_greedy(folder, prompts, max_new_tokens) -> list[list[int]]:
  """transformers' new tokens, one prompt at a time, including an end-of-sequence token."""
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
  """Greedy tokens, with a full forward pass for each."""
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
def test_greedy_equals_transformers_without_grouped_queries_and_with_an_untied_head(tmp_path, prompts, config):
  folder = write_tiny_llama(tmp_path, num_hidden_layers=2, **config)
  expected = torch_greedy(folder, prompts[1:4], 16)
  assert generate(load(folder), prompts[1:4], 16) == expected


def test_tokens_with_and_without_a_cache_are_equal_for_any_batch(model, prompts):
  expected = uncached(model, prompts, 24)
  assert generate(model, prompts, 24) == expected
  for batch_size in (1, 3):  # 3: the last batch is padded
    assert generate(model, prompts, 24, batch_size=batch_size) == expected
  assert generate(model, prompts, 5) == [tokens[:5] for tokens in expected]
  assert generate(model, prompts, 1) == [tokens[:1] for tokens in expected]


def test_logits_of_a_step_equal_those_of_a_full_forward_pass(model, prompts):
  tokens_T = np.array(prompts[-1], np.int32)
  x_BTD, _ = forward(model, tokens_T[None])
  whole_TV = logits_of(model, x_BTD)[0]
  # Two rows at different positions of one text. The second has padding, which must not be read.
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


def test_generation_ignores_the_gates(model, prompts):
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


def test_low_temperature_and_a_single_candidate_are_greedy(model, prompts):
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


def test_a_prompt_that_does_not_fit_is_refused(model, prompts):
  with pytest.raises(InputError, match='prompt 7 has 65 tokens.*--max_new_tokens=16.*80'):
    generate(model, prompts, 16, capacity=80)
  assert len(generate(model, prompts, 15, capacity=80)) == 8
  with pytest.raises(ValueError, match='65.*64'):
    prefill(model, np.array(prompts[-1:]), np.array([65]), 64)


@pytest.mark.parametrize(
  'rows, more, message',
  [
    ([[2], []], {}, 'prompt 1 has no tokens'),
    ([[2, 263]], {}, 'prompt 0 has the token 263, but the model has 263'),
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


def test_a_stream_equals_generate(model, prompts):
  for i, prompt in enumerate(prompts[:3]):
    expected = generate(model, [prompt], 12, eos_ids=(1,))[0]
    assert list(stream(model, prompt, 12, eos_ids=(1,))) == expected, i
  warm = dict(sampling=Sampling(1.5, 100, 0.99), seed=3)
  assert list(stream(model, prompts[0], 9, **warm)) == generate(model, [prompts[0]], 9, **warm)[0]


def test_no_prompts_give_no_tokens(model):
  assert generate(model, [], 4) == []


# ---- the real model ----


@pytest.mark.slow
@pytest.mark.usefixtures('whole_compiler')
def test_pruned_smollm2_generates_the_same_as_transformers(tmp_path):
  """8 prompts, 64 new tokens each, with an export that lacks two of the 30 layers."""
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
