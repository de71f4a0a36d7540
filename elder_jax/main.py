"""`python -m elder_jax.main --flagfile=configs/….flags`: flags → Config → pipeline."""

import sys

from absl import app
from absl import flags
from absl import logging
import jax

from elder_jax import config as config_lib
from elder_jax import pipeline
from elder_jax import report as report_lib
from elder_jax import verify
from elder_jax.errors import InputError
from elder_jax.train import NonFiniteLoss


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


def main(argv: list[str]):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell their inner life at INFO
  try:
    report = pipeline.run(config_lib.from_flags())
  except InputError as e:
    fail(2, str(e))
  except (NonFiniteLoss, verify.ExportMismatch) as e:
    fail(1, str(e))
  if jax.process_index() == 0:
    print(report_lib.markdown(report))
    print(f'The model: {config_lib.from_flags().path() / "export"}')


def run():
  config_lib.define_flags()
  app.run(main, flags_parser=parse)


if __name__ == '__main__':
  run()
