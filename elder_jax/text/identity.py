"""Identifies files and tokenizers by checksums of their content."""

import hashlib
import json
import pathlib

_SAMPLES, _SAMPLE = 64, 2**20  # pieces of a large file that are hashed, bytes of each


def of_corpus(paths: list[pathlib.Path]) -> str:
  """`of_files`. If the files exceed 64 MiB together, hashes smaller pieces of each, about 256 MiB in all."""
  if sum(path.stat().st_size for path in paths) <= _SAMPLES * _SAMPLE:
    return of_files(paths)
  return of_files(paths, max(4, 4096 // len(paths)), 2**16)


def of_files(paths: list[pathlib.Path], samples: int | None = None, sample: int | None = None) -> str:
  """sha256 over names, sizes and content. Of a file above 64 MiB, only pieces are hashed, its header included.

  Times are ignored: a copy of a model, or one downloaded again, has the same checksum.

  Args:
    paths: the files, in any order.
    samples, sample: number of pieces hashed of a larger file, and bytes of each; by default 64 of 1 MiB.
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
  """sha256 of the vocabulary and the tokenisation rules."""
  backend = getattr(tokenizer, 'backend_tokenizer', None)
  rules = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
  ids = tokenizer.bos_token_id, tokenizer.eos_token_id
  return hashlib.sha256(f'{ids}{rules}'.encode()).hexdigest()
