"""report.json, and the files made from it."""

from collections.abc import Callable
import pathlib
import tempfile

from elder_jax.devices import about
from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.errors import disk_is_full
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import safetensors_files
from elder_jax.hf.source import Source
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import log
from elder_jax.log import write_whole
from elder_jax.model import pruning
from elder_jax.recipes import find_recipe
from elder_jax.recipes.context import Choice
from elder_jax.run import curve
from elder_jax.run import lineage
from elder_jax.run import origin
from elder_jax.run import page
from elder_jax.run.card import model_card
from elder_jax.run.how_much import unread
from elder_jax.run.job import Job
from elder_jax.run.job import Run
from elder_jax.run.page.data import read_run
from elder_jax.run.plot import plot_curve
from elder_jax.run.plot import plot_sweep
from elder_jax.run.report import SCHEMA
from elder_jax.run.report import markdown
from elder_jax.text import zero_shot
from elder_jax.text.answers import pairs


def make_report(run: Run) -> dict:
  """report.json without what is known at the very end: bytes, verify, seconds, peak_bytes."""
  job, config = run.job, run.job.config
  (method, _), choice = next(iter(run.choices.items()))
  removed, num_layers, dense = choice.removed, job.source.num_layers, run.figures['dense']
  kept = pruning.kept_layers(num_layers, removed)
  params = {'dense': _num_params(job, range(num_layers)), 'pruned': _num_params(job, kept)}
  return {
    'schema': SCHEMA,
    'model': config.paths.model,
    'num_layers': num_layers,
    'removed': sorted(removed),
    'order': removed,
    'kept': kept,
    'method': method,
    'recipe': config.removal.recipe,
    'gates': choice.about.get('gates', []),
    'choices': [{'method': m, 'num_remove': n, **c.to_json()} for (m, n), c in run.choices.items()],
    'ppl': {c: {'dense': dense['ppl'][c], 'pruned': run.rows[-1]['ppl'][c]} for c in job.windows},
    'tasks': {'dense': dense['tasks'], 'pruned': run.rows[-1]['tasks']},
    'rows': run.rows,
    'heals': find_recipe(config.removal.recipe).heals,
    'teacher': _teacher(run),
    'held_out_loss': dense.get('held_out_loss'),
    'train_data': _about_text(job),
    'answers': pairs(list(job.prompts), run.answers.get('dense'), run.answers.get('pruned')),
    'corpora': {c: w.about for c, w in job.windows.items()},
    'params': params,
    'read_per_token': {which: count - unread(job.source.spec) for which, count in params.items()},
    'lineage': [*lineage.of_folder(job.source.files), lineage.step_of(config, num_layers, sorted(removed))],
    'origin': origin.read(config.paths.model, job.source.files),
    'steps': config.steps() if config.trains(config.removal.recipe) else 0,
    'tokens_per_step': config.data.batch_size * config.data.seq_len,
    'versions': about.package_versions(),
    'device': about.device_name(),
  }


def _teacher(run: Run) -> dict | None:
  """The figures of the teacher of a model that is healed."""
  if not (figures := run.figures.get('teacher')):
    return None
  return {'model': run.job.config.paths.teacher, 'num_layers': run.job.teacher.num_layers, **figures}


def _about_text(job: Job) -> list[dict]:
  """The sources of the training text, and how much of each a recipe's training read."""
  if job.batches is None:
    return []
  config = job.config
  steps = config.steps() if any(config.trains(r) for r in config.recipes()) else config.one_pass
  return job.batches.rows.about(steps * config.data.batch_size)


def _num_params(job: Job, kept) -> int:
  return pruning.num_params(abstract_decoder(job.source.spec.with_layers(list(kept)), len(kept)))


def bytes_on_disk(job: Job) -> dict:
  """{'dense', 'pruned'}: bytes of the files with weights, of the source and of the export."""
  source, export = job.source, job.config.path() / 'export'
  try:
    files = {'dense': _files_of(source), 'pruned': list(safetensors_files.headers(export))}
    return {which: sum(path.stat().st_size for path in paths) for which, paths in files.items()}
  except (OSError, InputError) as e:  # after all the work
    log(f'the report has no bytes on disk: {reason(e)}')
    return {}


def _files_of(source: Source) -> list[pathlib.Path]:
  """The files with weights."""
  if not source.is_gguf:
    return list(safetensors_files.headers(source.files))
  from elder_jax.hf.gguf.source import parts_of  # not at the top: it needs the package gguf

  return list(parts_of(user_path(source.name)))


def write_reports(job: Job, report: dict, folder: pathlib.Path):
  """report.md, report.html and the charts. A file that cannot be written costs nothing but itself."""
  if len(job.num_removes) > 1 and job.windows:
    cosmetic('sweep.svg', lambda: plot_sweep(report, folder / 'sweep.svg'))
  if curve.curves_of(report):
    cosmetic('curve.svg', lambda: plot_curve(report, folder / 'curve.svg'))
  write_pages(report, folder, job.config.paths.workdir)


def write_pages(report: dict, folder: pathlib.Path, name: str):
  """report.md and report.html.

  Args:
    name: the work folder as the user writes it.
  """
  cosmetic('report.md', lambda: write_whole(folder / 'report.md', markdown(report)))
  cosmetic(page.NAME, lambda: page.write(read_run(report, folder, name), folder / page.NAME))


def cosmetic(name: str, write: Callable[[], None]):
  """Writes a file that the result is complete without."""
  try:
    write()
  except Exception as e:  # of any kind  # noqa: BLE001
    if disk_is_full(e):
      raise
    log(f'{name} could not be written ({reason(e)}); everything else is complete')


def rehearse(job: Job, stages: list):
  """Writes the report's files with made-up figures into a temporary folder: what fails here would fail after all work."""
  if not hosts.is_leader():
    return
  figures = {
    'ppl': dict.fromkeys(job.windows, 10.0),
    'tasks': {task: {'acc': 0.5} for task in zero_shot.expand(job.config.evaluation.tasks)},
  }
  run = Run(job, lambda: '')
  run.figures['dense'] = figures
  run.answers = dict.fromkeys(('dense', 'pruned'), list(job.prompts))
  for stage in stages:
    if stage.name == 'teacher':
      run.figures['teacher'] = figures
    removed = list(range(stage.num_remove))
    if stage.makes_model:
      run.rows.append({'method': stage.method, 'recipe': stage.recipe, 'removed': removed, **figures})
      if job.held_out is not None and job.config.trains(stage.recipe):
        run.rows[-1]['held_out'] = [[0, 0, 3.0], [1, 1000, 2.0]]
    elif stage.method and not stage.recipe:
      run.choices[stage.method, stage.num_remove] = Choice(removed)
  report = make_report(run) | {'bytes': {'dense': 2, 'pruned': 1}, 'verify': {}, 'seconds': {}, 'peak_bytes': None}
  with tempfile.TemporaryDirectory() as folder:
    write_reports(job, report, pathlib.Path(folder))
    model_card(report, job.config.to_json())
