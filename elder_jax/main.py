"""`python -m elder_jax.main --flagfile=configs/….flags`: flags → Config → pipeline.

Exit status: 0 done; 1 a loss that is not finite, an export that is not the model, a full disk; 2 bad input; 3 it does
not fit (--plan, or a run without --force); 75 stopped by SIGTERM or a notice of preemption, 130 by Ctrl-C, both saved.
After 75, 130, and after 1 for a full disk, the same command resumes.
"""

import sys
import traceback

from absl import app
from absl import logging
import jax

from elder_jax import log as log_lib
from elder_jax.commands import cli
from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.errors import disk_is_full
from elder_jax.errors import user_path
from elder_jax.hf import verify
from elder_jax.run import config as config_lib
from elder_jax.run import pipeline
from elder_jax.run import report as report_lib
from elder_jax.run import workdir
from elder_jax.run.plan import compile as plan
from elder_jax.training.loop import NonFiniteLoss


def main(argv: list[str]):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell their inner life at INFO
  logging.get_absl_logger().setLevel('CRITICAL')  # Orbax: by tracebacks, what it raises in the main thread as well
  config = config_lib.from_flags()
  try:
    hosts.start(config_lib.launch_from_flags())
    preemption.listen()
    if line := config_lib.replaced():
      log_lib.say(line)
    if config.plan:
      sys.exit(plan.main(config))
    _keep_programs()
    report = pipeline.run(config)
  except InputError as e:
    hosts.leave(2, str(e))
  except (NonFiniteLoss, verify.ExportMismatch) as e:
    hosts.leave(1, str(e))
  except plan.DoesNotFit as e:
    hosts.leave(plan.DOES_NOT_FIT, str(e))
  except preemption.Preempted as e:
    hosts.leave(preemption.exit_status(), str(e))
  except KeyboardInterrupt:
    hosts.leave(cli.CTRL_C_STATUS, 'aborted by Ctrl-C; rerun the same command to resume')
  except Exception as e:
    if disk_is_full(e):
      hosts.leave(
        1, f'--workdir={config.workdir}: the disk is full; free some space and rerun the same command to resume'
      )
    if jax.process_count() == 1:
      if (kept := config.path() / workdir.FAILED).exists():
        print(f'elder_jax: this is a fault of elder_jax; please report it with {kept}', file=sys.stderr)
      raise
    hosts.leave(1, traceback.format_exc())
  if hosts.leads():
    print(report_lib.markdown(report))
    print(f'The model: {config.path() / "export"}')


def _keep_programs():
  """What the plan compiles is what the run needs, and a run that goes on needs it again: it is compiled once.

  Not on a CPU, where programs are small and those of another CPU may not run, and not by several processes, which share
  the work of compiling. Whoever has set JAX_COMPILATION_CACHE_DIR has their own way.
  """
  if jax.default_backend() == 'cpu' or jax.process_count() > 1 or jax.config.jax_compilation_cache_dir:
    return
  jax.config.update('jax_compilation_cache_dir', str(user_path('~/.cache/elder_jax/programs')))
  jax.config.update('jax_compilation_cache_max_size', 2**31)  # bytes; what was not used for longest goes first


def run():
  config_lib.define_flags()
  app.run(main, flags_parser=cli.parse)


if __name__ == '__main__':
  run()
