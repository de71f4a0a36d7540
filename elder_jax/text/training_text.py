"""Opens and checks the training text of a run, and selects its training rows and held-out rows."""

import dataclasses
import hashlib
import itertools
import json
import pathlib

import numpy as np

from elder_jax.errors import InputError
from elder_jax.errors import cache_folder
from elder_jax.errors import user_path
from elder_jax.text import chat
from elder_jax.text import data
from elder_jax.text import identity
from elder_jax.text.blend import Part
from elder_jax.text.blend import Rows
from elder_jax.text.blend import Source
from elder_jax.text.blend import Window
from elder_jax.text.blend import parts_of
from elder_jax.text.blend import shares
from elder_jax.text.documents import Documents
from elder_jax.text.encoder import Encoder
from elder_jax.text.settings import DataSettings
from elder_jax.text.token_store import TokenStore

# Largest source, in bytes of text, that is tokenised whole at the start, so that rows are drawn from all of it.
SMALL = 64 * 2**20
_VERSION = 1  # of the tokenisation; a change invalidates cached tokens
_LOOKED_AT = 1024  # rows that are checked before the long work begins

FIRST_CONVERSATIONS = 100  # conversations that are rendered to check a source


@dataclasses.dataclass(frozen=True)
class TrainingText:
  """The training rows, the held-out rows of --validate_every (or None), and {source: checksum of its content}."""

  rows: Rows
  held_out: Rows | None
  read: dict[str, str]


def open_text(
  settings: DataSettings,
  tokenizer,
  bos_first: bool,
  vocab_size: int,
  validates: bool = False,
  shared: pathlib.Path | None = None,
  setting: str = 'train_data',
) -> TrainingText:
  """Opens the training text of these settings.

  Args:
    settings: of the training text.
    tokenizer: a tokenizer of transformers.
    bos_first: of the model's family, see data.bos_rule.
    vocab_size: of the model.
    validates: hold sequences out.
    shared: token cache that all processes can read, used unless --token_cache is set; None: the user's own cache.
    setting: the setting named in errors.

  Raises:
    InputError: a source cannot be read or is too short, or the tokenizer does not fit the source or the model.
  """
  bos, first = data.bos_rule(settings.bos, bos_first, tokenizer)
  window, cache = Window(settings.seq_len, first), _folder(settings, shared)
  between = settings.documents
  if between == 'auto':
    between = 'wikitext' if tokenizer.eos_token_id is None else 'eos'
  tokenizer_sha256 = identity.of_tokenizer(tokenizer)
  sources, small, read = [], [], {}
  for part in parts_of(settings.train_data, setting):
    documents = Documents(setting, part.source, settings.text_column)
    is_small = documents.size is not None and documents.size <= SMALL
    if not is_small and settings.shuffle:
      documents.in_order_of_hashes(settings.seed)
    chats, masked = _conversations(part, documents, tokenizer, settings)
    content = documents.revision or identity.of_corpus(documents.files)
    if chats:  # their tokens depend on the template too
      content = hashlib.sha256(f'{content}{tokenizer.chat_template}'.encode()).hexdigest()
    options = [_VERSION, content, tokenizer_sha256, [f.name for f in documents.files], part.source.split(':')[1:]]
    options += [settings.text_column, between, bos == 'tokenizer', settings.train_on]
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    encoder = Encoder(documents, tokenizer, between, bos == 'tokenizer', settings.train_on)
    sources.append(Source(part, TokenStore(cache / key[:32], encoder, len(tokenizer)), window, masked))
    small.append(is_small)
    read[part.source] = content
  return _blend(settings, sources, small, vocab_size, validates, read)


def _folder(settings: DataSettings, shared: pathlib.Path | None) -> pathlib.Path:
  if settings.token_cache:
    return user_path(settings.token_cache)
  return shared or cache_folder() / 'tokens'


def _conversations(part: Part, documents: Documents, tokenizer, settings: DataSettings) -> tuple[bool, bool]:
  """(whether a source has conversations, whether some of its tokens do not count), from its first documents.

  Raises:
    InputError: the chat template refuses each of these. Conversations that it refuses later are skipped one by one.
  """
  refused = None
  for document, _ in itertools.islice(documents.read(), FIRST_CONVERSATIONS):
    if isinstance(document.content, str):
      return False, False
    chat.check(part.setting, part.source, tokenizer)
    if settings.train_on == 'all':
      return True, False
    try:
      chat.encode(part.setting, part.source, tokenizer, document.content)
      return True, True
    except chat.Refused as e:
      refused = e
  raise refused or InputError(part.setting, part.source, 'is empty; give a file with text.')


def _blend(settings, sources: list[Source], small: list[bool], vocab_size: int, validates: bool, read) -> TrainingText:
  weights = [source.part.weight for source in sources]
  needed = shares(weights, settings.sequences)
  out = -(-settings.validation_sequences // settings.batch_size) * settings.batch_size  # rounded up to whole batches
  held = shares(weights, out if validates else 0)
  seed = settings.seed if settings.shuffle else None
  alone = len(sources) == 1 and settings.train_tokens is None
  for source, rows, out, is_small in zip(sources, needed, held, small):
    source.draw(rows, out, seed, is_small)
    must = out + (rows if alone and is_small else min(1, rows))  # other sources repeat
    if source.num_rows(must) < must:
      wanted = f'--num_sequences={rows}' if alone and not out else f'{must} sequences'
      raise InputError(source.part.setting, source.part.given, source.too_short(wanted, must))
  rows = Rows(sources, needed, vocab_size=vocab_size)
  rows[np.arange(min(len(rows), _LOOKED_AT))]
  held_out = Rows(sources, held, True, vocab_size) if validates else None
  return TrainingText(rows, held_out, read)
