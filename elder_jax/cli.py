"""What all commands share: how flags are read, and how one sentence and an exit status end a command."""

import sys

from absl import flags


def parse(argv: list[str]) -> list[str]:
  """absl's parser with our exit status: 2 for bad flags, in one sentence."""
  try:
    rest = flags.FLAGS(argv, known_only=False)
  except flags.Error as e:
    fail(2, f'{" ".join(str(e).split())} (see --helpfull)')
  except UnicodeDecodeError:
    fail(2, '--flagfile: is not a text file; give one with a flag on each line (see --helpfull)')
  if len(rest) > 1:
    fail(2, f'{rest[1]!r} is no flag: every setting is given as --name=value (see --helpfull)')
  return rest


def fail(status: int, sentence: str):
  print(f'elder_jax: {sentence}', file=sys.stderr)
  sys.exit(status)
