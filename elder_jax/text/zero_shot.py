"""Zero-shot tasks: runs lm-evaluation-harness on a model in JAX (lm_eval_adapter.py).

`elder_jax eval --model=FOLDER` evaluates any model that elder_jax reads and prints a table. The questions of a task come
from the Hugging Face hub. Without access to it, --tasks_dir names a folder of local task files, which replace the
harness's tasks of the same name (`python -m benchmarks.tasks` writes some). `--tasks=quick` stands for six tasks (SETS).
"""

from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import logging as python_logging
import math
import os
import pathlib
import re
import tempfile
import traceback

import jax.numpy as jnp

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode

TASKS = ('piqa', 'winogrande', 'hellaswag', 'arc_easy', 'arc_challenge')
# Names that stand for several tasks. quick: cloze, physical and commonsense reasoning, science, and arithmetic. Only the
# last tests generation; the others choose among given answers.
SETS = {'quick': ('lambada_openai', 'piqa', 'arc_easy', 'hellaswag', 'winogrande', 'gsm8k')}


def expand(tasks: Sequence[str]) -> list[str]:
  """Replaces names of SETS by their tasks and removes duplicates."""
  return list(dict.fromkeys(name for task in tasks for name in SETS.get(task, (task,))))


def load_tasks(tasks: Sequence[str], tasks_dir: str = ''):
  """Loads tasks and their questions, so that `run` itself cannot fail on them.

  Args:
    tasks: names of tasks, groups, tags or SETS.
    tasks_dir: folder of local task files.

  Returns:
    The harness's TaskDict.

  Raises:
    InputError: lm_eval is missing, a task is unknown or its file is broken, or its questions cannot be loaded.
  """
  try:
    import lm_eval.tasks  # not at the top: it is optional and takes a second
  except ImportError as e:
    raise InputError(
      'tasks',
      ','.join(tasks),
      f"lm-evaluation-harness is missing ({reason(e)}); install it with pip install 'elder_jax[eval]'.",
    ) from e
  folder = user_path(tasks_dir).resolve() if tasks_dir else None
  if folder and not folder.is_dir():
    raise InputError('tasks_dir', tasks_dir, 'there is no such folder; check the path.')
  if folder and re.search(r'[][*?]|::', str(folder)):
    raise InputError('tasks_dir', folder, 'the harness reads [, ], *, ? and :: as a pattern; rename the folder.')
  _quiet()
  manager = lm_eval.tasks.TaskManager(include_path=folder)
  if not tasks:
    raise InputError('tasks', '', 'is empty; name a task, as in --tasks=piqa.')
  if taken := [name for name in tasks if name in SETS and name in manager.all_tasks]:
    raise InputError(
      'tasks', taken[0], f'stands for {",".join(SETS[taken[0]])}, but is also the name of a task; rename the task.'
    )
  tasks = expand(tasks)
  # Paths in a task file are relative to its folder. Without one, an empty folder: a hub id must not match a local path.
  with tempfile.TemporaryDirectory() as empty, contextlib.chdir(folder or empty):
    for task in tasks:
      if folder:
        _check_task_file(manager, task, folder)
      if task not in manager.all_tasks:
        raise InputError('tasks', task, 'the harness has no such task; check the name, or give --tasks_dir.')
    try:
      return manager.load(tasks)
    except Exception as e:  # of any type: hub not reachable, data set deleted, broken file  # noqa: BLE001
      raise InputError(
        'tasks',
        ','.join(tasks),
        f'the questions cannot be loaded ({reason(e)}); correct --tasks or the task file, or '
        'give local task files with --tasks_dir if the hub is not reachable.',
      ) from e


def _quiet():
  """Turns off progress bars, and the harness's notes on task files that use the defaults of a metric."""
  import datasets

  datasets.disable_progress_bars()
  logger = python_logging.getLogger('lm_eval.api.task')
  if _no_default not in logger.filters:
    logger.addFilter(_no_default)


def _no_default(record: python_logging.LogRecord) -> bool:
  return 'using default' not in record.getMessage()


def _check_task_file(manager, task: str, folder: pathlib.Path):
  """Raises InputError for a task file that the harness ignores silently: it would use its own task, or none."""
  entry = manager.task_index.get(task)
  if entry and (entry.yaml_path is None or entry.yaml_path.is_relative_to(folder)):
    return
  named = re.compile(rf'^\s*(task|group)\s*:\s*["\']?{re.escape(task)}["\']?\s*$', re.MULTILINE)
  for path in sorted(p for p in folder.rglob('*') if p.suffix.lower() in ('.yaml', '.yml') and p.is_file()):
    if path.stem != task and not named.search(path.read_text(encoding='utf-8', errors='replace')):
      continue
    if path.suffix != '.yaml':
      raise InputError('tasks', task, f'the harness reads .yaml files only; rename {path}.')
    try:
      manager.load([str(path)])
    except Exception as e:  # of any type  # noqa: BLE001
      raise InputError('tasks', task, f'the harness cannot read {path} ({reason(e)}); correct the file.') from e


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
  """Evaluates a model zero-shot, unless a task file sets num_fewshot.

  Args:
    loaded: of `load_tasks`; may be reused for another model.
    limit: questions per task, from the start; None: all.
    Others: see lm_eval_adapter.JaxLM.

  Returns:
    {task: {'acc': a fraction, 'acc_stderr': its standard error, …, 'n': questions}}, with the metrics of each task. A
    value is None if it is not a finite number. A group has no n.

  Raises:
    InputError: a task needs something that the adapter does not support, its file is broken, or the model's scores are
      not finite.
  """
  from lm_eval import evaluator

  from elder_jax.text import lm_eval_adapter

  lm = lm_eval_adapter.JaxLM(model, tokenizer, mode, batch_size, max_length, put, eos_ids, progress)
  for task in loaded['tasks'].values():
    if task.get_config('num_fewshot') is None:
      task.set_config(key='num_fewshot', value=0)
    task.set_fewshot_seed(seed=1234)  # the harness's default
  # A mean has a standard error in closed form. Other metrics are bootstrapped, by default in forked processes, which are
  # unsafe with JAX.
  os.environ.setdefault('DISABLE_MULTIPROC', '1')
  try:
    results = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
  except Exception as e:
    if any(frame.f_code.co_filename == lm_eval_adapter.__file__ for frame, _ in traceback.walk_tb(e.__traceback__)):
      raise  # from the model; other errors come from the harness, which runs code of the task file
    names = ','.join(loaded['tasks'])
    raise InputError('tasks', names, f'the harness fails ({reason(e)}); correct the task or leave it out.') from e
  figures = {}
  for task, values in results['results'].items():
    # 'acc,none' is acc without a filter of the answers.
    figures[task] = {k.removesuffix(',none'): _number(v) for k, v in values.items() if ',' in k}
    if task in results['n-samples']:
      figures[task]['n'] = results['n-samples'][task]['effective']
  return figures


def program(shapes: Shapes, model: Decoder, name: str) -> Program:
  """The scores of a batch of requests as long as a window, for the plan. Longer requests need more memory and time."""
  from elder_jax.text import lm_eval_adapter

  settings = shapes.settings.evaluation
  B, T = settings.eval_batch_size, settings.eval_seq_len
  args = model, *[shapes.batch(B, T)] * 3, shapes.mode
  flops = shapes.flops(model.num_layers, B * T, T)
  return Program(f'zero-shot, {name}', lm_eval_adapter.token_scores, args, flops, device_bytes(model))


def _number(value) -> float | None:
  """None if the value is not a finite number: the harness returns 'N/A' for an unknown standard error."""
  try:
    value = float(value)
  except (TypeError, ValueError):
    return None
  return value if math.isfinite(value) else None


def context_length(config: dict, tokenizer) -> int:
  """The context length of a model with this config.json, in tokens, by the rule of the harness's hf backend."""
  for name in ('n_positions', 'max_position_embeddings', 'n_ctx'):
    if config.get(name) is not None:
      return int(config[name])
  limit = tokenizer.model_max_length
  return int(limit) if limit < 1e29 else 2048  # a tokenizer without a limit has 1e30
