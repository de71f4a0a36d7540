"""Shared by the tests of bad input: checks that a run refuses its settings in one sentence."""

import json
import pathlib
import re

import pytest
from tiny import config_of

from benchmarks import docs_errors
from elder_jax.errors import InputError
from elder_jax.run import pipeline


def refused(settings, *parts, **more) -> str:
  """Runs and returns the error. It must be one sentence with all `parts`, and config.json must not change."""
  settings = {**settings, **more}
  record = pathlib.Path(settings['workdir']) / 'config.json'
  before = record.read_bytes() if record.is_file() else None
  with pytest.raises(InputError) as caught:
    pipeline.run(config_of(**settings))
  one_sentence(caught.value.for_command(), *parts)
  assert (record.read_bytes() if record.is_file() else None) == before
  return caught.value.for_command()


def one_sentence(message: str, *parts):
  assert re.fullmatch(r'[^\r\n]+\.', message), message
  assert len(message) < 700, message
  assert any(sentence.matches(message) for sentence in docs_errors.sentences()), f'not in docs/errors.md: {message}'
  for part in parts:
    assert str(part) in message, message


def edit_json(path: pathlib.Path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
