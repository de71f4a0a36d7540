"""The settings of the training text."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
  """The training text, which layers are chosen by as well."""

  train_data: tuple[str, ...] = setting(
    (),
    'Text to train on, as [name=]source[@weight]; repeatable, for a blend. A source: a .txt, .md, .json, .jsonl or '
    '.parquet file, also as .gz or .zst, a folder of files of one of these kinds, a pattern for names in a folder '
    '(texts/*.jsonl.gz), or a hub id, which is streamed: id, id:configuration, id:split or id:configuration:split.',
    repeats=True,
  )
  text_column: str = setting(
    'text',
    'Column that holds the text, or messages. Without it a row may have messages, or prompt and completion; those are '
    "written by the tokenizer's chat template.",
  )
  train_on: str = setting(
    'assistant',
    "Tokens of a conversation that count in the loss: assistant, the assistant's; all.",
    choices=('assistant', 'all'),
  )
  documents: str = setting(
    'auto',
    "What stands between two documents of the training text: eos, the tokenizer's end-of-text token; wikitext, an empty "
    'line, as in the evaluation texts; auto: eos where the tokenizer has such a token.',
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
    'Tokens to train on, as in 20M, in place of --num_sequences; rounded to whole batches. A source with less than its '
    'share is repeated, which the report counts.',
    least=1,
  )
  num_sequences: int = setting(128, 'Training sequences; a single small text must be long enough for them.', least=1)
  batch_size: int = setting(4, 'Sequences per step; must divide --num_sequences.', least=1)
  validation_sequences: int = setting(
    32, 'Sequences held out of the training text for --validate_every, rounded up to whole batches.', least=1, rare=True
  )
  shuffle: bool = setting(
    True,
    'Draw the sequences from the whole of a source (of files up to 64 MiB) and shuffle them in each pass; else text order.',
    rare=True,
  )
  seed: int = setting(
    0,
    "Seed of the choice and order of the sequences and of LoRA's first factors; nothing else in a run is random.",
    least=0,
  )
  seeds: tuple[int, ...] = setting(
    (),
    'Several seeds, as in 0,1,2: a run of each, and a table of means and deviations; the first is exported.',
    least=0,
  )
  token_cache: str = setting(
    '',
    'Folder where the tokens of training texts are kept, for this run and later ones. Unset: ~/.cache/elder_jax/tokens; '
    'of a run of several processes, a folder in --workdir.',
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
