"""`elder_jax generate`: continues a prompt."""

import dataclasses
import pathlib
import tempfile

from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.spec import Mode
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text import data
from elder_jax.text.decoding import Sampling
from elder_jax.text.generation import check_prompts
from elder_jax.text.generation import check_settings
from elder_jax.text.generation import eos_ids
from elder_jax.text.generation import generate


@dataclasses.dataclass(frozen=True)
class GenerateSettings(Settings):
  """A model, and how to sample tokens from it."""

  model: str = setting('', 'Model: a Hugging Face folder such as an export, a hub id, or a .gguf file.')
  tokenizer: str = setting('', "Folder or hub id of the tokenizer. Unset: the model's own.")
  max_new_tokens: int = setting(64, 'Maximum number of new tokens.')
  temperature: float = setting(0.0, 'Sampling temperature; 0: greedy, always the most probable token.')
  top_k: int = setting(0, 'Sample only from the k most probable tokens; 0: from all tokens.')
  top_p: float = setting(1.0, 'Sample only from the most probable tokens whose probabilities add up to this.')
  seed: int = setting(0, 'Random seed of the sampling.')
  dtype: str = setting('float32', 'Type of computation and of weights.', choices=('float32', 'bfloat16'))

  def __post_init__(self):
    super().__post_init__()
    check_settings(self.sampling, self.seed, max_new_tokens=self.max_new_tokens)

  @property
  def sampling(self) -> Sampling:
    return Sampling(self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class PromptSettings(Settings):
  """The text to continue."""

  prompt: str = setting('', 'Text to continue. No chat template is applied.')


def continue_text(settings: GenerateSettings, prompt: str) -> str:
  """Returns the text that the model generates after the prompt.

  Raises:
    InputError: bad settings, model or prompt.
  """
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(settings.model, pathlib.Path(scratch))
    tokenizer = data.load_tokenizer(settings.tokenizer or str(source.files))
    ends = eos_ids(source)
    tokens = tokenizer(prompt, verbose=False)['input_ids']
    if not tokens:
      raise InputError('prompt', '', 'is missing or empty; give some text.')
    context = source.context_length
    check_prompts([tokens], source.spec.vocab_size, settings.max_new_tokens, context)
    model = load_model(source, settings.dtype)
  new = generate(
    model,
    [tokens],
    settings.max_new_tokens,
    eos_ids=ends,
    sampling=settings.sampling,
    seed=settings.seed,
    mode=Mode(dtype=settings.dtype),
    capacity=context,
  )
  return tokenizer.decode(new[0], skip_special_tokens=True)


def run(parsed: Parsed):
  given = dict(parsed.settings)
  prompt = given.pop('prompt', '')
  print(continue_text(GenerateSettings(**given), prompt))


COMMAND = Command(
  'generate',
  'Print the text that a model generates after a prompt.',
  run,
  {'Prompt': PromptSettings, 'Model and sampling': GenerateSettings},
  ("elder_jax generate --model=runs/mine/export --prompt='Once upon a time'",),
)
