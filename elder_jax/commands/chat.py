"""`elder_jax chat`: chats with a model, using its chat template."""

from collections.abc import Iterator
import pathlib
import sys
import tempfile

from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.commands.generate import GenerateSettings
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.log import log
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.text import data
from elder_jax.text import generation

_ROOM = 512  # default of --max_new_tokens


class Chat:
  """A model and the conversation so far."""

  def __init__(self, model: Decoder, tokenizer, settings: GenerateSettings, ends: tuple[int, ...], context: int | None):
    """Starts an empty conversation.

    Args:
      tokenizer: of transformers, with a chat template.
      ends: ids of the tokens that end an answer.
      context: number of positions of the model; None: unlimited.
    """
    self._model, self._tokenizer, self._settings = model, tokenizer, settings
    self._ends, self._context, self._turns = ends, context, []

  def answer(self, text: str) -> Iterator[str]:
    """Yields the model's answer in pieces. Raises InputError if the conversation has become too long."""
    self._turns.append({'role': 'user', 'content': text})
    made = self._tokenizer.apply_chat_template(
      self._turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    tokens, shown, settings = [], '', self._settings
    stream = generation.stream(
      self._model,
      list(made),
      settings.max_new_tokens,
      eos_ids=self._ends,
      sampling=settings.sampling,
      seed=settings.seed + len(self._turns),
      mode=Mode(dtype=settings.dtype),
      capacity=self._context,
    )
    for token in stream:
      tokens.append(token)
      text = self._tokenizer.decode(tokens, skip_special_tokens=True)
      if not text.endswith('\ufffd'):  # an incomplete character: the next token completes it
        yield text[len(shown) :]
        shown = text
    self._turns.append({'role': 'assistant', 'content': shown})


def open_chat(settings: GenerateSettings) -> Chat:
  """Loads the model. Raises InputError for one without a chat template, before reading its weights."""
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(settings.model, pathlib.Path(scratch))
    tokenizer = data.load_tokenizer(settings.tokenizer or str(source.files))
    if not tokenizer.chat_template:
      raise InputError('model', settings.model, 'has no chat template; use elder_jax generate or another --tokenizer.')
    ends = generation.eos_ids(source)
    log(f'loading {settings.model}, {source.num_layers} layers, in {settings.dtype}')
    return Chat(load_model(source, settings.dtype), tokenizer, settings, ends, source.context_length)


def run(parsed: Parsed):
  chat = open_chat(GenerateSettings(**{'max_new_tokens': _ROOM} | parsed.settings))
  prompt = '> ' if sys.stdin.isatty() else ''
  while True:
    try:
      text = input(prompt)
    except EOFError:
      return
    for piece in chat.answer(text):
      print(piece, end='', flush=True)
    print()


COMMAND = Command(
  'chat',
  'Chat with a model, using its chat template. Each line is a message; answers are streamed. Ctrl-D exits.',
  run,
  {'Model and sampling': GenerateSettings},
  ('elder_jax chat --model=runs/mine/export --temperature=0.7',),
)
