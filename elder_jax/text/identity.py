"""Files and tokenizers, known by their content."""

import hashlib
import json
import pathlib

_SAMPLES, _SAMPLE = 64, 2**20  # of a large file: pieces, bytes of each


def of_corpus(paths: list[pathlib.Path]) -> str:
  """`of_files`; where all together have more than 64 MiB, over smaller pieces of each, some 256 MiB in all."""
  if sum(path.stat().st_size for path in paths) <= _SAMPLES * _SAMPLE:
    return of_files(paths)
  return of_files(paths, max(4, 4096 // len(paths)), 2**16)


def of_files(paths: list[pathlib.Path], samples: int | None = None, sample: int | None = None) -> str:
  """sha256 over names, sizes and content; of a file of more than 64 MiB over pieces of it, its header among them.

  Args:
    samples, sample: number of pieces of a file, and bytes of each, where it has more bytes than those; unset: 64 of 1 MiB.

  A copy of a model, or one that was fetched again, is the same model: times do not count.
  """
  samples, sample, digest = samples or _SAMPLES, sample or _SAMPLE, hashlib.sha256()
  for path in sorted(paths):
    size = path.stat().st_size
    digest.update(f'{path.name} {size}\n'.encode())
    with path.open('rb') as file:
      if size <= samples * sample:
        digest.update(file.read())
        continue
      for i in range(samples):
        file.seek(i * (size - sample) // (samples - 1))
        digest.update(file.read(sample))
  return digest.hexdigest()


def of_tokenizer(tokenizer) -> str:
  """sha256 of the vocabulary and of the rules by which text is cut."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
  ids = tokenizer.bos_token_id, tokenizer.eos_token_id
  return hashlib.sha256(f'{ids}{rules}'.encode()).hexdigest()
