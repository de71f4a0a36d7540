"""Files and tokenizers, known by their content."""

import hashlib
import json
import pathlib

_SAMPLES, _SAMPLE = 64, 2**20  # of a large file: pieces, bytes of each


def of_files(paths: list[pathlib.Path]) -> str:
  """sha256 over names, sizes and content; of a file of more than 64 MiB over pieces of it, its header among them.

  A copy of a model, or one that was fetched again, is the same model: times do not count.
  """
  digest = hashlib.sha256()
  for path in sorted(paths):
    size = path.stat().st_size
    digest.update(f'{path.name} {size}\n'.encode())
    with path.open('rb') as file:
      if size <= _SAMPLES * _SAMPLE:
        digest.update(file.read())
        continue
      for i in range(_SAMPLES):
        file.seek(i * (size - _SAMPLE) // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE))
  return digest.hexdigest()


def of_tokenizer(tokenizer) -> str:
  """sha256 of the vocabulary and of the rules by which text is cut."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
  ids = tokenizer.bos_token_id, tokenizer.eos_token_id
  return hashlib.sha256(f'{ids}{rules}'.encode()).hexdigest()
