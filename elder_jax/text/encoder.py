"""Tokenises documents."""

from collections.abc import Iterator
import math

import numpy as np

from elder_jax.errors import InputError
from elder_jax.log import log
from elder_jax.text import chat
from elder_jax.text.documents import Document
from elder_jax.text.documents import Documents
from elder_jax.text.documents import Place
from elder_jax.text.reading import kind_of
from elder_jax.text.token_store import Encoded

_TOGETHER = 2**20  # characters tokenised in one call


class Encoder:
  """The tokens of a source's documents, one after another.

  Texts are separated by the tokenizer's end-of-text token (eos), or by an empty line as if all were one text (wikitext).
  Conversations follow each other without a separator, as the chat template renders them.
  """

  def __init__(self, documents: Documents, tokenizer, between: str, special_tokens: bool, train_on: str):
    """Prepares to tokenise a source.

    Args:
      documents: the source.
      tokenizer: a tokenizer of transformers.
      between: the separator of texts: eos or wikitext.
      special_tokens: the tokenizer adds its special tokens.
      train_on: which tokens of a conversation count in the loss: assistant (those the assistant wrote) or all.

    Raises:
      InputError: `between` is eos, but the tokenizer has no end-of-text token.
    """
    self._documents, self._tokenizer, self._between = documents, tokenizer, between
    self._special, self._train_on = special_tokens, train_on
    self._can_chat, self._refused = False, 0
    if between == 'eos' and tokenizer.eos_token_id is None:
      raise InputError('documents', 'eos', 'the tokenizer has no end-of-text token; use --documents=wikitext.')

  def __call__(self, place: Place) -> Iterator[Encoded]:
    """Yields the tokens from `place` on. Raises InputError for content that cannot be read or rendered."""
    waiting, size = [], 0
    inside = place.document > 0 and self._is_text(place.file)  # a text file is one document
    first = place == Place(0, 0)
    for document, after in self._documents.read(place):
      if isinstance(document.content, str):
        waiting.append((document, not inside, first, after))
        size += len(document.content)
      if size >= _TOGETHER or not isinstance(document.content, str):
        yield from self._texts(waiting)
        waiting, size = [], 0
      if not isinstance(document.content, str):
        yield self._conversation(document, after)
      inside, first = not document.ends, False
    yield from self._texts(waiting)

  def _is_text(self, file: int) -> bool:
    files = self._documents.files
    return bool(files) and kind_of(files[file])[0] in ('.txt', '.md')

  def _texts(self, waiting: list[tuple[Document, bool, bool, Place]]) -> Iterator[Encoded]:
    """waiting: (document, whether it starts here, whether it is the first of the source, the place after it)."""
    wikitext = self._between == 'wikitext'
    texts = [
      '\n\n' + document.content if wikitext and begins and not first else document.content
      for document, begins, first, _ in waiting
    ]
    special = [self._special and (first if wikitext else begins) for _, begins, first, _ in waiting]
    tokens: list[list[int]] = [[]] * len(texts)
    for which in (True, False):
      if numbers := [i for i, s in enumerate(special) if s == which]:
        made = self._tokenizer([texts[i] for i in numbers], add_special_tokens=which, verbose=False)['input_ids']
        for i, of_text in zip(numbers, made):
          tokens[i] = of_text
    eos = self._tokenizer.eos_token_id
    for of_text, (document, *_, after) in zip(tokens, waiting):
      if not wikitext and document.ends and of_text[-1:] != [eos]:
        of_text = [*of_text, eos]
      yield np.array(of_text, np.int64), None, after

  def _conversation(self, document: Document, after: Place) -> Encoded:
    flag, source = self._documents.flag, self._documents.source
    if not self._can_chat:
      chat.check(flag, source, self._tokenizer)
      self._can_chat = True
    own_N = None
    try:
      if self._train_on == 'all':
        tokens = chat.tokens_of(flag, source, self._tokenizer, document.content)
      else:
        tokens, own_N = chat.encode(flag, source, self._tokenizer, document.content)
    except chat.Refused as e:
      self._refused += 1
      if math.log10(self._refused).is_integer():  # logging each of many would be noise
        log(f'--{flag}={source}: {self._refused} rows skipped so far: {e.why}')
      tokens, own_N = [], None if self._train_on == 'all' else np.zeros(0, bool)
    return np.array(tokens, np.int64), own_N, after
