"""Zero-shot tasks: accuracies of a model by lm-evaluation-harness, run in JAX (lm_eval_adapter.py).

`elder_jax eval --model=FOLDER` evaluates any model that elder_jax reads and prints a table. A task's
questions come from the model hub; where none is reached, --tasks_dir names a folder of local task files, which go before
the harness's own of the same name (`python -m benchmarks.tasks` writes some). `--tasks=quick` stands for six: SETS.
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
# Names that stand for several tasks. quick: cloze, physical and commonsense reasoning, science, and arithmetic by
# generation, which no choice among given answers tests.
SETS = {'quick': ('lambada_openai', 'piqa', 'arc_easy', 'hellaswag', 'winogrande', 'gsm8k')}


def expand(tasks: Sequence[str]) -> list[str]:
  """The names of tasks, each once, those of SETS replaced by what they stand for."""
  return list(dict.fromkeys(name for task in tasks for name in SETS.get(task, (task,))))


def load_tasks(tasks: Sequence[str], tasks_dir: str = ''):
  """The harness's TaskDict of tasks, groups, tags or SETS by name, questions loaded; the slow or failing part of `run`.

  Raises:
    InputError: lm_eval is missing, a task is unknown or its file is broken, or its questions cannot be loaded.
  """
  try:
    import lm_eval.tasks  # here: it is optional and takes a second
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
    raise InputError('tasks_dir', folder, 'the harness takes [, ], *, ? and :: for a pattern; rename the folder.')
  _quiet()
  manager = lm_eval.tasks.TaskManager(include_path=folder)
  if not tasks:
    raise InputError('tasks', '', 'is empty; name a task, as in --tasks=piqa.')
  if taken := [name for name in tasks if name in SETS and name in manager.all_tasks]:
    raise InputError(
      'tasks', taken[0], f'stands for {",".join(SETS[taken[0]])}, but is also the name of a task; rename the task.'
    )
  tasks = expand(tasks)
  # A task file may name its questions from where it lies; a hub id is not to be found in the current folder.
  with tempfile.TemporaryDirectory() as empty, contextlib.chdir(folder or empty):
    for task in tasks:
      if folder:
        _check_task_file(manager, task, folder)
      if task not in manager.all_tasks:
        raise InputError('tasks', task, 'the harness has no such task; check the name, or give --tasks_dir.')
    try:
      return manager.load(tasks)
    except Exception as e:  # a hub that is not reached, a data set that is gone, a broken file: any kind  # noqa: BLE001
      raise InputError(
        'tasks',
        ','.join(tasks),
        f'the questions cannot be loaded ({reason(e)}); correct --tasks or the task file, or '
        'give a local one with --tasks_dir where the hub is not reached.',
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
      raise InputError('tasks', task, f'the harness reads .yaml files only; rename {path}.')
    try:
      manager.load([str(path)])
    except Exception as e:  # any kind  # noqa: BLE001
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
    raise InputError('tasks', names, f'the harness fails ({reason(e)}); correct the task or leave it out.') from e
  figures = {}
  for task, values in results['results'].items():
    # 'acc,none' is acc without a filter on the answers.
    figures[task] = {k.removesuffix(',none'): _number(v) for k, v in values.items() if ',' in k}
    if task in results['n-samples']:
      figures[task]['n'] = results['n-samples'][task]['effective']
  return figures


def program(shapes: Shapes, model: Decoder, name: str) -> Program:
  """The scores of a batch of requests as long as a window, for the plan; longer ones take more."""
  from elder_jax.text import lm_eval_adapter

  settings = shapes.settings.evaluation
  B, T = settings.eval_batch_size, settings.eval_seq_len
  args = model, shapes.batch(B, T), shapes.batch(B, T), shapes.mode
  flops = shapes.flops(model.num_layers, B * T, T)
  return Program(f'zero-shot, {name}', lm_eval_adapter.token_scores, args, flops, device_bytes(model))


def _number(value) -> float | None:
  """None for what is no finite number: the harness gives 'N/A' for a standard error that it does not know."""
  try:
    value = float(value)
  except (TypeError, ValueError):
    return None
  return value if math.isfinite(value) else None


def context_length(config: dict, tokenizer) -> int:
  """Tokens that a model of this config.json reads at most, by the rule of the harness's hf backend."""
  for name in ('n_positions', 'max_position_embeddings', 'n_ctx'):
    if config.get(name) is not None:
      return int(config[name])
  limit = tokenizer.model_max_length
  return int(limit) if limit < 1e29 else 2048  # a tokenizer without a limit says 1e30
