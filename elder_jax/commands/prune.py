"""`elder_jax prune`, the same as `python -m elder_jax.main`: a whole run.

Exit statuses:
  0: done.
  1: the loss is not finite, the export differs from the model, or the disk is full.
  2: bad input.
  3: the run does not fit (--plan, or a run without --force).
  75: stopped by SIGTERM or a preemption notice, and saved.
  130: stopped by Ctrl-C, and saved.
After 75, 130 and a full disk, rerun the same command to resume.
"""

import traceback

from absl import logging
import jax

from elder_jax import errors
from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.errors import cache_folder
from elder_jax.errors import disk_is_full
from elder_jax.hf import verify
from elder_jax.hf.push import PushFailed
from elder_jax.log import log
from elder_jax.methods.elder import GateSettings
from elder_jax.methods.mask import MaskSettings
from elder_jax.methods.swaps import SwapSettings
from elder_jax.run import page
from elder_jax.run import plan
from elder_jax.run import series
from elder_jax.run import workdir
from elder_jax.run.config import PLACES
from elder_jax.run.config import ComputeSettings
from elder_jax.run.config import Config
from elder_jax.run.config import PathSettings
from elder_jax.run.removal_settings import RemovalSettings
from elder_jax.run.report import markdown
from elder_jax.run.result_settings import EvalSettings
from elder_jax.run.result_settings import OutputSettings
from elder_jax.text.settings import DataSettings
from elder_jax.training.loop import NonFiniteLoss
from elder_jax.training.settings import TrainSettings

GROUPS = {
  'Inputs and work folder': PathSettings,
  'Which layers to remove, and how': RemovalSettings,
  'Training text': DataSettings,
  'Training, for every recipe that trains': TrainSettings,
  'Method elder': GateSettings,
  'Method mask': MaskSettings,
  'Method swaps': SwapSettings,
  'Evaluation': EvalSettings,
  'Devices, memory, checkpoints': ComputeSettings,
  'Export and tracking': OutputSettings,
  'Several processes': hosts.Launch,
}


def run(parsed: Parsed) -> int | None:
  return run_config(parsed, parsed.settings)


def run_config(parsed: Parsed, settings: dict) -> int | None:
  """Executes a run. On an error, every process prints one sentence and exits.

  Args:
    parsed: the parsed arguments, for their note and the settings of hosts.Launch.
    settings: by name; those of hosts.Launch are ignored here.

  Returns:
    The exit status; None is 0.
  """
  logging.get_absl_logger().setLevel('CRITICAL')  # Orbax also logs, with tracebacks, the errors that it raises
  config = None
  try:
    config = Config.of(**{name: value for name, value in settings.items() if name in PLACES})
    hosts.start(hosts.Launch(**{name: v for name, v in parsed.settings.items() if name not in PLACES}))
    preemption.listen()
    if parsed.note:
      log(parsed.note)
    if config.computation.plan:
      return plan.plan(config)
    _keep_programs()
    report = series.run(config)
  except (Exception, KeyboardInterrupt, preemption.Preempted) as e:
    _leave(e, config)
    raise
  if hosts.is_leader():
    print(markdown(report))
    if (html := config.path() / page.NAME).exists():
      print(f'The report: {html}')
    print(f'Exported model: {config.path() / "export"}')
  return None


def _leave(error: BaseException, config: Config | None):
  """Exits with the status of the error. For a bug it returns instead, after adding the path of failed.txt as a note."""
  if isinstance(error, InputError):
    hosts.leave(errors.BAD_INPUT, error.for_command())
  if isinstance(error, NonFiniteLoss | verify.ExportMismatch | PushFailed):
    hosts.leave(errors.FAILED, str(error))
  if isinstance(error, plan.DoesNotFit):
    hosts.leave(errors.DOES_NOT_FIT, str(error))
  if isinstance(error, preemption.Preempted):
    hosts.leave(preemption.exit_status(), str(error))
  if isinstance(error, KeyboardInterrupt):
    hosts.leave(errors.CTRL_C, 'aborted by Ctrl-C; rerun the same command to resume')
  if disk_is_full(error) and config is not None:
    full = 'the disk is full; free some space and rerun the same command to resume'
    hosts.leave(errors.FAILED, f'--workdir={config.paths.workdir}: {full}')
  if jax.process_count() > 1:
    hosts.leave(errors.FAILED, traceback.format_exc())
  if config is not None and (kept := config.path() / workdir.FAILED).exists():
    error.add_note(str(kept))


def _keep_programs():
  """Keeps compiled programs in a cache, so that the plan, the run and a resumed run compile each only once.

  Not on a CPU, where programs are small and may not run on another CPU. Not with several processes, which share the work
  of compiling. Not if JAX_COMPILATION_CACHE_DIR is set.
  """
  if jax.default_backend() == 'cpu' or jax.process_count() > 1 or jax.config.values['jax_compilation_cache_dir']:
    return
  jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'programs'))
  jax.config.update('jax_compilation_cache_max_size', 2**31)  # bytes; evicts the least recently used


COMMAND = Command(
  'prune',
  'Choose layers, fold their function into the remaining layers, remove them, train, and export.',
  run,
  GROUPS,
  (
    'elder_jax prune --config=smollm2_135m_demo --workdir=runs/mine --num_remove=5',
    'elder_jax prune --model=FOLDER --workdir=runs/x --remove_layers=12-14 --recipe=none --compare=',
    'elder_jax prune --config=llama3_8b --method=auto,sleb,elder --compare=none,regularize',
    'elder_jax prune --config=runs/x/config.json --workdir=runs/y --ratio=0.25,0.1,0.2,0.4',
  ),
  configs=True,
)
