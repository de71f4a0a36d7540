"""`elder_jax eval`: zero-shot tasks of lm-evaluation-harness, run in JAX."""

import dataclasses
import functools
import importlib.metadata
import pathlib
import tempfile

import jax

from elder_jax.commands.command import Command
from elder_jax.commands.command import out_file
from elder_jax.commands.flags import Parsed
from elder_jax.devices import about
from elder_jax.devices import sharding
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import Progress
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.model.spec import Mode
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import metric_figure
from elder_jax.run.tables import metric_head
from elder_jax.run.tables import task_metrics
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text import data
from elder_jax.text import generation
from elder_jax.text import zero_shot


@dataclasses.dataclass(frozen=True)
class TaskSettings(Settings):
  """A model, and the tasks to run."""

  model: str = setting('', 'Model: a Hugging Face folder such as an export, a hub id, or a .gguf file.')
  tokenizer: str = setting('', "Folder or hub id of the tokenizer. Unset: the model's own.")
  tasks: tuple[str, ...] = setting(
    zero_shot.TASKS,
    'Tasks of lm-evaluation-harness, or of --tasks_dir. quick: lambada_openai, piqa, arc_easy, hellaswag, winogrande, and '
    'gsm8k by generation.',
  )
  tasks_dir: str = setting(
    '', "Folder of local task files (.yaml). They override the harness's own tasks of the same name."
  )
  limit: int = setting(0, 'Questions to use from the start of each task; 0: all.', least=0)
  batch_size: int = setting(16, 'Requests per step.', least=1)
  dtype: str = setting('float32', 'Type of weights and computation.', choices=('float32', 'bfloat16'))
  mesh: tuple[int, ...] = setting(
    (-1, 1, 1), 'Devices for data, fsdp and tensor parallelism; -1: all remaining devices.'
  )
  out: str = setting('', 'JSON file for the results.')


def evaluate_model(settings: TaskSettings) -> dict:
  """Loads a model, evaluates it, and returns what --out contains.

  Raises:
    InputError: bad settings, model or tasks.
  """
  out = out_file(settings.out)
  mesh = sharding.make_mesh(settings.mesh)
  sharding.check_batch(mesh, settings.mesh, settings.batch_size, '--batch_size')
  with tempfile.TemporaryDirectory() as scratch:
    source = open_source(settings.model, pathlib.Path(scratch))
    tokenizer = data.load_tokenizer(settings.tokenizer or str(source.files))
    loaded = zero_shot.load_tasks(list(settings.tasks), settings.tasks_dir)
    shardings = sharding.for_model(abstract_decoder(source.spec, source.num_layers), mesh, settings.mesh)
    log(f'loading {settings.model}, {source.num_layers} layers, in {settings.dtype} on {about.device_name()}')
    model = load_model(source, settings.dtype, shardings)
    with jax.set_mesh(mesh):
      figures = zero_shot.run(
        model,
        tokenizer,
        loaded,
        Mode(dtype=settings.dtype),
        settings.batch_size,
        zero_shot.context_length(source.config, tokenizer),
        functools.partial(sharding.put_batch, mesh=mesh),
        settings.limit or None,
        generation.eos_ids(source),
        Progress('requests'),
      )
  versions = about.package_versions() | {'lm_eval': importlib.metadata.version('lm_eval')}
  result = {'settings': dataclasses.asdict(settings), 'tasks': figures, 'versions': versions}
  if out and jax.process_index() == 0:
    write_json(out, result)
  return result


def table(figures: dict[str, dict[str, float | None]]) -> str:
  """Returns a Markdown table: a row per task with its metrics and standard errors. Accuracies are in percent."""
  metrics = list(dict.fromkeys(m for values in figures.values() for m in task_metrics(values)))
  rows = []
  for task, values in figures.items():
    cells = [metric_figure(values, metric) for metric in metrics]
    rows.append([task, figure(values.get('n'), 0, limit=1e9), *cells])
  return markdown_table(['task', 'questions', *map(metric_head, metrics)], rows)


def run(parsed: Parsed):
  result = evaluate_model(TaskSettings(**parsed.settings))
  if jax.process_index() == 0:
    print(table(result['tasks']))


COMMAND = Command(
  'eval',
  'Run zero-shot tasks of lm-evaluation-harness, without torch. Needs pip install "elder_jax[eval]".',
  run,
  {'Model and tasks': TaskSettings},
  (
    'elder_jax eval --model=runs/mine/export --tasks=piqa,arc_easy',
    'elder_jax eval --model=FOLDER --tasks=mine --tasks_dir=tasks   (local task files, without the hub)',
  ),
)
