"""Zero-shot tasks: accuracies of a model by lm-evaluation-harness, run in JAX (lm_eval_adapter.py).

`python -m elder_jax.zero_shot --model=FOLDER` evaluates any model that elder_jax reads and prints a table. A task's
questions come from the model hub; where none is reached, --tasks_dir names a folder of local task files, which go before
the harness's own of the same name (`python -m benchmarks.tasks` writes some).
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import importlib.metadata
import logging as python_logging
import math
import os
import pathlib
import re
import tempfile
import traceback

from absl import flags
import jax
import jax.numpy as jnp

from elder_jax import log as log_lib
from elder_jax.commands import cli
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import checkpoint_hf
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.run import report as report_lib
from elder_jax.text import data
from elder_jax.text import generation

TASKS = ('piqa', 'winogrande', 'hellaswag', 'arc_easy', 'arc_challenge')


def load_tasks(tasks: list[str], tasks_dir: str = ''):
  """The harness's TaskDict of tasks, groups or tags by name, questions loaded; the slow or failing part of `run`.

  Raises:
    InputError: lm_eval is missing, a task is unknown or its file is broken, or its questions cannot be loaded.
  """
  try:
    import lm_eval.tasks  # here: it is optional and takes a second
  except ImportError as e:
    raise InputError(
      f"--tasks: lm-evaluation-harness is missing ({reason(e)}); install it with pip install 'elder_jax[eval]'."
    ) from e
  folder = user_path(tasks_dir).resolve() if tasks_dir else None
  if folder and not folder.is_dir():
    raise InputError(f'--tasks_dir={tasks_dir}: there is no such folder; check the path.')
  if folder and re.search(r'[][*?]|::', str(folder)):
    raise InputError(f'--tasks_dir={folder}: the harness takes [, ], *, ? and :: for a pattern; rename the folder.')
  _quiet()
  manager = lm_eval.tasks.TaskManager(include_path=folder)
  if not tasks:
    raise InputError('--tasks is empty; name a task, as in --tasks=piqa.')
  # A task file may name its questions from where it lies; a hub id is not to be found in the current folder.
  with tempfile.TemporaryDirectory() as empty, contextlib.chdir(folder or empty):
    for task in tasks:
      if folder:
        _check_task_file(manager, task, folder)
      if task not in manager.all_tasks:
        raise InputError(f'--tasks={task}: the harness has no such task; check the name, or give --tasks_dir.')
    try:
      return manager.load(list(dict.fromkeys(tasks)))
    except Exception as e:  # a hub that is not reached, a data set that is gone, a broken file: any kind  # noqa: BLE001
      raise InputError(
        f'--tasks={",".join(tasks)}: the questions cannot be loaded ({reason(e)}); correct --tasks or the task file, or '
        'give a local one with --tasks_dir where the hub is not reached.'
      ) from e


def _quiet():
  """Without the harness's notes on each metric of which a task file leaves something to its default, and other bars."""
  import datasets

  datasets.disable_progress_bars()
  logger = python_logging.getLogger('lm_eval.api.task')
  if _no_default not in logger.filters:
    logger.addFilter(_no_default)


def _no_default(record: python_logging.LogRecord) -> bool:
  return 'using default' not in record.getMessage()


def _check_task_file(manager, task: str, folder: pathlib.Path):
  """Raises InputError for a file of a task that the harness passes over in silence: it would take its own, or none."""
  entry = manager.task_index.get(task)
  if entry and (entry.yaml_path is None or entry.yaml_path.is_relative_to(folder)):
    return
  named = re.compile(rf'^\s*(task|group)\s*:\s*["\']?{re.escape(task)}["\']?\s*$', re.MULTILINE)
  for path in sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.yaml', '.yml') and p.is_file()):
    if path.stem != task and not named.search(path.read_text(encoding='utf-8', errors='replace')):
      continue
    if path.suffix != '.yaml':
      raise InputError(f'--tasks={task}: the harness reads .yaml files only; rename {path}.')
    try:
      manager.load([str(path)])
    except Exception as e:  # any kind  # noqa: BLE001
      raise InputError(f'--tasks={task}: the harness cannot read {path} ({reason(e)}); correct the file.') from e


def run(
  model: Decoder,
  tokenizer,
  loaded,
  mode: Mode = Mode(),
  batch_size: int = 16,
  max_length: int = 2048,
  put: Callable = jnp.asarray,
  limit: int | None = None,
  eos_ids: tuple[int, ...] = (),
  progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, dict[str, float | None]]:
  """Evaluates a model, without examples in the prompt unless a task's own file asks for them.

  Args:
    loaded: of `load_tasks`; may be used again for another model.
    limit: questions per task, from the start; None: all.
    Others: see lm_eval_adapter.JaxLM.

  Returns:
    {task: {'acc': a fraction, 'acc_stderr': its standard error, …, 'n': questions}}, whatever the task measures, None
    for what is no finite number; a group has no n.

  Raises:
    InputError: a task asks for what the adapter cannot do, its file is broken, or the model's scores are not finite.
  """
  from lm_eval import evaluator

  from elder_jax.text import lm_eval_adapter

  lm = lm_eval_adapter.JaxLM(model, tokenizer, mode, batch_size, max_length, put, eos_ids, progress)
  for task in loaded['tasks'].values():
    if task.get_config('num_fewshot') is None:
      task.set_config(key='num_fewshot', value=0)
    task.set_fewshot_seed(seed=1234)  # the harness's default
  # Means have a standard error in closed form. Others are bootstrapped, by default in forked processes, which JAX does
  # not go well with.
  os.environ.setdefault('DISABLE_MULTIPROC', '1')
  try:
    results = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
  except Exception as e:
    if any(frame.f_code.co_filename == lm_eval_adapter.__file__ for frame, _ in traceback.walk_tb(e.__traceback__)):
      raise  # of the model; the rest is the harness's, which runs what a task's file says
    names = ','.join(loaded['tasks'])
    raise InputError(f'--tasks={names}: the harness fails ({reason(e)}); correct the task or leave it out.') from e
  figures = {}
  for task, values in results['results'].items():
    # 'acc,none' is acc without a filter on the answers.
    figures[task] = {k.removesuffix(',none'): _number(v) for k, v in values.items() if ',' in k}
    if task in results['n-samples']:
      figures[task]['n'] = results['n-samples'][task]['effective']
  return figures


def token_scores() -> Callable:
  """The jitted function that scores requests (lm_eval_adapter)."""
  from elder_jax.text import lm_eval_adapter

  return lm_eval_adapter.token_scores


def _number(value) -> float | None:
  """None for what is no finite number: the harness gives 'N/A' for a standard error that it does not know."""
  try:
    value = float(value)
  except (TypeError, ValueError):
    return None
  return value if math.isfinite(value) else None


def table(figures: dict[str, dict[str, float | None]]) -> str:
  """Markdown: a row per task, all that it measures with standard errors; fractions of right answers in percent."""
  metrics_in_order = list(dict.fromkeys(m for values in figures.values() for m in report_lib.task_metrics(values)))
  rows = [['task', 'questions', *map(report_lib.metric_head, metrics_in_order)]]
  rows.append(['---'] + ['---:'] * (1 + len(metrics_in_order)))
  for task, values in figures.items():
    cells = [report_lib.metric_figure(values, metric) for metric in metrics_in_order]
    rows.append([task, report_lib.figure(values.get('n'), 0, limit=1e9), *cells])
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


# ---- the command ----


@dataclasses.dataclass(frozen=True)
class Settings:
  """The command's flags; see define_flags."""

  model: str
  tokenizer: str
  tasks: tuple[str, ...]
  tasks_dir: str
  limit: int
  batch_size: int
  dtype: str
  mesh: str
  out: str


def evaluate_model(settings: Settings) -> dict:
  """Loads a model and evaluates it; what goes into --out.

  Raises:
    InputError.
  """
  for name, least in (('limit', 0), ('batch_size', 1)):
    if (value := getattr(settings, name)) < least:
      raise InputError(f'--{name}={value} is too small; give at least {least}.')
  out = cli.out_file(settings.out)
  mesh = sharding.make_mesh(settings.mesh)
  sharding.check_batch(mesh, settings.mesh, settings.batch_size, '--batch_size')
  with tempfile.TemporaryDirectory() as scratch:
    source = checkpoint_hf.open_source(settings.model, pathlib.Path(scratch))
    tokenizer = data.load_tokenizer(settings.tokenizer or str(source.files))
    loaded = load_tasks(list(settings.tasks), settings.tasks_dir)
    abstract = jax.eval_shape(lambda: Decoder(source.spec, source.num_layers, jax.random.key(0)))
    log_lib.say(f'loading {settings.model}, {source.num_layers} layers, in {settings.dtype} on {report_lib.device()}')
    model = checkpoint_hf.load(source, settings.dtype, sharding.for_model(abstract, mesh, settings.mesh))
    with jax.set_mesh(mesh):
      figures = run(
        model,
        tokenizer,
        loaded,
        Mode(dtype=settings.dtype),
        settings.batch_size,
        context_length(source.config, tokenizer),
        lambda batch: sharding.put_batch(batch, mesh),
        settings.limit or None,
        generation.eos_ids(source),
        log_lib.Progress('requests'),
      )
  versions = report_lib.versions() | {'lm_eval': importlib.metadata.version('lm_eval')}
  result = {'settings': dataclasses.asdict(settings), 'tasks': figures, 'versions': versions}
  if out and jax.process_index() == 0:
    report_lib.write_json(out, result)
  return result


def context_length(config: dict, tokenizer) -> int:
  """Tokens that a model of this config.json reads at most, by the rule of the harness's hf backend."""
  for name in ('n_positions', 'max_position_embeddings', 'n_ctx'):
    if config.get(name) is not None:
      return int(config[name])
  limit = tokenizer.model_max_length
  return int(limit) if limit < 1e29 else 2048  # a tokenizer without a limit says 1e30


def define_flags():
  """Only when this is the command: some have the names of flags of elder_jax.config."""
  text = functools.partial(flags.DEFINE_string, module_name='elder_jax')
  number = functools.partial(flags.DEFINE_integer, module_name='elder_jax')
  kwargs = {'flag_values': flags.FLAGS}
  text('model', '', 'Model: a Hugging Face folder, such as an export, a hub id or a .gguf file.', **kwargs)
  text('tokenizer', '', "Folder or hub id of the tokenizer, where it is not the model's own.", **kwargs)
  flags.DEFINE_list(
    'tasks', list(TASKS), 'Tasks of lm-evaluation-harness, or of --tasks_dir.', module_name='elder_jax', **kwargs
  )
  text('tasks_dir', '', "Folder of local task files (.yaml), which go before the harness's own of a name.", **kwargs)
  number('limit', 0, 'Questions per task, from the start; 0: all.', **kwargs)
  number('batch_size', 16, 'Requests per step.', **kwargs)
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16'], 'Type of weights and computation.', module_name='elder_jax', **kwargs
  )
  text('mesh', '-1,1,1', 'Devices for data, fsdp and tensor parallelism, as in elder_jax.main.', **kwargs)
  text('out', '', 'File for the figures (JSON).', **kwargs)


def main(argv: list[str]):
  del argv
  values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
  result = evaluate_model(Settings(**values | {'tasks': tuple(values['tasks'])}))
  if jax.process_index() == 0:
    print(table(result['tasks']))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
