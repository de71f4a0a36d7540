"""The settings of the training text."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
  """The training text. It is also the calibration data that layers are chosen by."""

  train_data: tuple[str, ...] = setting(
    (),
    'Text to train on, as [name=]source[@weight]; repeat the flag to blend sources. A source is a .txt, .md, .json, '
    '.jsonl or .parquet file, also as .gz or .zst; a folder of files of one of these kinds; a file pattern '
    '(texts/*.jsonl.gz); or a hub id, which is streamed: id, id:configuration, id:split or id:configuration:split.',
    repeats=True,
  )
  text_column: str = setting(
    'text',
    'Column that holds the text, or messages. Rows without it may have messages, or prompt and completion, which the '
    "tokenizer's chat template renders.",
  )
  train_on: str = setting(
    'assistant',
    'Tokens of a conversation that count in the loss: those of the assistant, or all.',
    choices=('assistant', 'all'),
  )
  documents: str = setting(
    'auto',
    "Separator of the training text's documents. eos: the tokenizer's end-of-text token. wikitext: an empty line, as in "
    'the evaluation texts. auto: eos if the tokenizer has that token, else wikitext.',
    choices=('auto', 'eos', 'wikitext'),
  )
  bos: str = setting(
    'auto',
    'Where to put a begin-of-sequence token. tokenizer: wherever the tokenizer adds one. window: first in every training '
    'sequence and evaluation window. none: nowhere. auto: window for Gemma, which needs it, tokenizer otherwise.',
    choices=('auto', 'tokenizer', 'window', 'none'),
  )
  seq_len: int = setting(2048, 'Tokens per training sequence.', least=2)
  train_tokens: int | None = setting(
    None,
    'Tokens to train on, such as 20M, in place of --num_sequences; rounded to whole batches. A source shorter than its '
    'share is repeated; the report counts the repetitions.',
    least=1,
  )
  num_sequences: int = setting(128, 'Training sequences. A single small source must be long enough for all.', least=1)
  batch_size: int = setting(4, 'Sequences per step; must divide --num_sequences.', least=1)
  validation_sequences: int = setting(
    32, 'Training sequences held out for --validate_every, rounded up to whole batches.', least=1, rare=True
  )
  shuffle: bool = setting(
    True,
    'Draw the sequences at random from the whole source (of files up to 64 MiB) and shuffle each pass; else text order.',
    rare=True,
  )
  seed: int = setting(
    0,
    'Seed of the choice and order of the sequences and of the initial LoRA factors. Nothing else in a run is random.',
    least=0,
  )
  seeds: tuple[int, ...] = setting(
    (),
    'Several seeds, such as 0,1,2: one run each, and a table of means and deviations. The first run is exported.',
    least=0,
  )
  token_cache: str = setting(
    '',
    'Folder that caches the tokens of training texts. Unset: ~/.cache/elder_jax/tokens, or a folder in --workdir for a '
    'run of several processes.',
    rare=True,
  )

  def __post_init__(self):
    if isinstance(self.train_data, str):
      object.__setattr__(self, 'train_data', (self.train_data,) if self.train_data else ())
    super().__post_init__()
    if self.train_tokens is None and self.num_sequences % self.batch_size:
      raise InputError(
        'batch_size', self.batch_size, f'does not divide --num_sequences={self.num_sequences}; change one of them.'
      )

  @property
  def sequences(self) -> int:
    """Training sequences, in whole batches."""
    if self.train_tokens is None:
      return self.num_sequences
    return max(1, round(self.train_tokens / (self.seq_len * self.batch_size))) * self.batch_size
