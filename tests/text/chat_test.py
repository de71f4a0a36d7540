"""The assistant's tokens with the templates of real tokenizers, against the turns between their markers."""

import pathlib
import re

import numpy as np
import pytest

from elder_jax.hf.source import open_source
from elder_jax.text import chat
from elder_jax.text import data

ASSETS = pathlib.Path('~/.cache/elder_jax').expanduser()
SMOLLM2, GEMMA3 = 'SmolLM2-135M-Instruct.Q4_1.gguf', 'gemma-3-270m-Q4_K_M.gguf'
# Regular expressions of an assistant's turn.
CHATML, GEMMA_TURN = r'<\|im_start\|>assistant\n(.*?<\|im_end\|>)', r'<start_of_turn>model\n(.*?<end_of_turn>)'
# Google's template for Gemma 3, without images.
GEMMA = (
  "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
  "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
  "{%- for message in rest -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
  "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
  "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
  "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}"
  "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
CONVERSATION = [
  {'role': 'system', 'content': 'Answer in short.'},
  {'role': 'user', 'content': 'Who wrote “Emma”? <b>'},
  {'role': 'assistant', 'content': 'Jane Austen, in 1815. 漢字 🙂'},
  {'role': 'user', 'content': 'assistant\nAnd then?'},
  {'role': 'assistant', 'content': 'Persuasion.\n\nIt came out in 1817.'},
]


@pytest.fixture(scope='module', params=[(SMOLLM2, None), (SMOLLM2, GEMMA), (GEMMA3, GEMMA)])
def tokenizer(request, tmp_path_factory):
  name, template = request.param
  if name == GEMMA3 and not (ASSETS / name).exists():
    pytest.skip('python -m benchmarks.assets --gemma downloads it')  # optional: 238 MB, under its own terms
  tokenizer = data.load_tokenizer(str(open_source(str(ASSETS / name), tmp_path_factory.mktemp('x')).files))
  tokenizer.chat_template, tokenizer.turn = (template, GEMMA_TURN) if template else (tokenizer.chat_template, CHATML)
  return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize('messages', [CONVERSATION, CONVERSATION[1:], CONVERSATION[:3], CONVERSATION[1:2]])
def test_the_assistants_tokens_are_those_of_its_turns(tokenizer, messages):
  tokens, own_N = chat.encode('train_data', 'x', tokenizer, messages)
  whole = tokenizer.apply_chat_template(messages, tokenize=False)
  assert (
    tokens == tokenizer(whole, add_special_tokens=False)['input_ids'] == chat.tokens_of('', '', tokenizer, messages)
  )
  turns = re.findall(tokenizer.turn, whole, re.DOTALL)
  assert len(turns) == sum(message['role'] == 'assistant' for message in messages)
  borders = np.flatnonzero(np.diff(np.concatenate([[False], own_N, [False]])))
  found = [tokenizer.decode(tokens[first:end]) for first, end in borders.reshape(-1, 2)]
  assert found == turns
