"""`python -m elder_jax.main --flagfile=configs/….flags`: flags → Config → pipeline."""

import sys
import traceback

from absl import app
from absl import logging
import jax

from elder_jax import cli
from elder_jax import config as config_lib
from elder_jax import hosts
from elder_jax import pipeline
from elder_jax import plan
from elder_jax import report as report_lib
from elder_jax import verify
from elder_jax.errors import InputError
from elder_jax.train import NonFiniteLoss


def main(argv: list[str]):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell their inner life at INFO
  try:
    hosts.start(config_lib.launch_from_flags())
    config = config_lib.from_flags()
    if config.plan:
      sys.exit(plan.main(config))
    report = pipeline.run(config)
  except InputError as e:
    hosts.leave(2, str(e))
  except (NonFiniteLoss, verify.ExportMismatch) as e:
    hosts.leave(1, str(e))
  except Exception:
    if jax.process_count() == 1:
      raise
    hosts.leave(1, traceback.format_exc())
  if hosts.leads():
    print(report_lib.markdown(report))
    print(f'The model: {config_lib.from_flags().path() / "export"}')


def run():
  config_lib.define_flags()
  app.run(main, flags_parser=cli.parse)


if __name__ == '__main__':
  run()
