"""The work of each stage. A function gets the run and the stage, and its result is saved in stages/ as JSON."""

from collections.abc import Callable
import dataclasses
import functools

from elder_jax import methods
from elder_jax.devices import memory
from elder_jax.devices import preemption
from elder_jax.devices import sharding
from elder_jax.entries import find_entry
from elder_jax.errors import InputError
from elder_jax.hf import verify
from elder_jax.log import log
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.recipes import find_recipe
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.run import exporting
from elder_jax.run import fits
from elder_jax.run import row_training
from elder_jax.run.job import Job
from elder_jax.run.job import Run
from elder_jax.run.job import load
from elder_jax.run.tables import is_fraction
from elder_jax.run.tables import main_metric
from elder_jax.text import answers
from elder_jax.text import perplexity
from elder_jax.text import zero_shot
from elder_jax.text.generation import eos_ids
from elder_jax.training import validation

GIVEN = 'given'  # stands for a method if --remove_layers gives the layers


def take_nothing(run: Run, stage, result):
  """Stage.take of a stage that only checks, or that stored its result in the run itself."""


def load_dense(run: Run, stage):
  del stage
  run.dense.get()


def check_source(run: Run, stage) -> dict:
  """Compares the model with the same files loaded in PyTorch. A run that only copies loads the model for this."""
  del stage
  job = run.job
  model = load(job) if job.copies else run.dense.get()
  tokens_BT = exporting.some_tokens(job)[:, :32]
  figures = verify.check_source(job.source, model, job.config.computation.dtype, tokens_BT, job.torch)
  if why := figures.get('torch_error'):
    log(f'the unpruned model could not be checked in PyTorch: {why}')
  return figures


# ---- measuring ----


def measure_dense(run: Run, stage) -> dict:
  model = run.dense.get()
  figures = measure(run.job, model, stage.name, fatal=True)
  return figures | _held_out(run.job, model, stage.name) | _answers(run.job, model, stage.name)


def take_dense(run: Run, stage, result: dict):
  run.figures[stage.name] = result
  run.answers['dense'] = result.get('answers')  # earlier versions saved no answers


def measure_teacher(run: Run, stage) -> dict:
  model = run.teacher.get() if run.job.config.training.taught else run.teacher.take()
  return measure(run.job, model, stage.name) | _held_out(run.job, model, stage.name)


def take_figures(run: Run, stage, result: dict):
  run.figures[stage.name] = result


def take_row(run: Run, stage, result: dict):
  removed = sorted(run.choices[stage.method, stage.num_remove].removed)
  figures = {name: v for name, v in result.items() if name != 'answers'}
  run.rows.append({'method': stage.method, 'recipe': stage.recipe, 'removed': removed, **figures})
  if stage.exported:
    run.answers['pruned'] = result.get('answers')
  if not stage.exported:
    row_training.clear(run.job, stage.name)
    fits.clear(run.job, stage.name)


def measure_row(run: Run, stage) -> dict:
  job, config = run.job, run.job.config
  found = measure(job, run.pruned, stage.name) | _held_out(job, run.pruned, stage.name)
  if job.held_out is not None and config.trains(stage.recipe):
    found['held_out'] = row_training.curve(job, stage.name)
  return found | (_answers(job, run.pruned, stage.name) if stage.exported else {})


def _held_out(job: Job, model: Decoder | None, name: str) -> dict:
  """{'held_out_loss': nats per token}; empty if no sequences are held out."""
  if job.held_out is None:
    return {}
  loss = validation.held_out_loss(model, job.held_out, job.mode)
  log(f'held-out loss of {name}: {loss:.4f}')
  return {'held_out_loss': loss}


def measure(job: Job, model: Decoder | None, name: str, fatal: bool = False) -> dict:
  """Returns {'ppl': {corpus: perplexity}, 'tasks': the result of zero_shot.run}.

  Args:
    fatal: a task that fails ends the run, as no work is lost yet. Otherwise the row only has no results of tasks.

  Raises:
    InputError: a task failed and `fatal` is set.
  """
  figures = {'ppl': _perplexities(job, model, name), 'tasks': {}}
  if job.tasks:
    try:
      figures['tasks'] = _task_figures(job, model, name)
    except InputError as e:
      if fatal:
        raise
      log(f'no task results for {name}: {e.for_command()}')
  return figures


def _task_figures(job: Job, model: Decoder | None, name: str) -> dict:
  settings = job.config.evaluation
  return zero_shot.run(
    model,
    job.tokenizer,
    job.tasks,
    job.mode,
    settings.eval_batch_size,
    zero_shot.context_length(job.source.config, job.tokenizer),
    _put(job),
    settings.task_limit or None,
    eos_ids(job.source),
    job.log.progress(f'zero-shot tasks of {name}'),
  )


def _answers(job: Job, model: Decoder | None, name: str) -> dict:
  """{'answers': a text for each of job.prompts}; empty without prompts, or if the model cannot answer."""
  if not job.prompts:
    return {}
  log(f'generating answers of {name} to {len(job.prompts)} prompts')
  rows, length = list(job.prompts.values()), job.config.evaluation.answer_tokens
  try:
    return {'answers': answers.answer(model, job.tokenizer, rows, length, eos_ids(job.source), job.mode, _put(job))}
  except InputError as e:  # no measurement depends on the answers
    log(f'no answers for {name}: {e.for_command()}')
    return {}


def _perplexities(job: Job, model: Decoder | None, name: str) -> dict[str, float]:
  result, batch_size = {}, job.config.evaluation.eval_batch_size
  for corpus, windows in job.windows.items():
    progress = job.log.progress(f'perplexity of {name} on {corpus}', tokens=windows.tokens_NT.shape[1])
    result[corpus] = perplexity.perplexity(model, windows, job.mode, batch_size, _put(job), progress)
    log(f'perplexity of {name} on {corpus}: {result[corpus]:.3f}')
  return result


def _put(job: Job) -> Callable:
  """Returns a function that puts a host array on the devices, and stops the run there after a signal."""

  def put(array):
    preemption.check()
    return sharding.put_batch(array, job.mesh)

  return put


# ---- choosing ----


def take_given(run: Run, stage) -> dict:
  del stage
  return Choice(sorted(run.job.config.removal.remove_layers)).to_json()


def take_choice(run: Run, stage, result: dict):
  run.choices[stage.method, stage.num_remove] = Choice.from_json(result).first(stage.num_remove)


def choose(run: Run, stage, most: int) -> dict:
  context = Context(
    run.dense.get(),
    run.job.batches if run.job.batches is not None else (),
    run.job.config,
    run.job.mode,
    run.job.log,
    functools.partial(row_training.checkpoints, run.job),
    notes=functools.partial(row_training.notes, run.job),
  )
  context = dataclasses.replace(context, judge=_judge(run.job, context))
  return methods.choose(stage.method, context, most).to_json()


def _judge(job: Job, context: Context) -> Callable[[Decoder], float] | None:
  """The function of --judge_by; lower is better. None for the held-out loss, which the method computes itself."""
  by = job.config.removal.judge_by
  if by == 'loss':
    return None
  if ':' in by:
    own = find_entry('judge_by', by, {}, Callable)
    return lambda model: own(model, context)
  return lambda model: -_score(by, _task_figures(job, model, 'a candidate').get(by, {}))


def _score(task: str, values: dict) -> float:
  """The fraction of correct answers. Raises InputError for a task without one."""
  metric = main_metric(values)
  if not is_fraction(metric):
    raise InputError('judge_by', task, 'has no fraction of correct answers; use another task, or loss.')
  return values[metric]


# ---- applying recipes ----


def treat(run: Run, stage):
  """Creates run.pruned by the stage's recipe. This consumes the dense model; the next row loads it again."""
  choice = run.choices[stage.method, stage.num_remove]
  num_layers = run.job.source.num_layers
  log(f'{stage.name}: removing layers {sorted(choice.removed)} (0-based) of {num_layers}')
  run.pruned = None  # frees the model of the previous row
  if run.job.copies:
    return
  run.pruned = apply_recipe(run, stage, choice)


def apply_recipe(run: Run, stage, choice: Choice) -> Decoder:
  """Returns the model by a recipe. All recipes see the same steps and batches.

  If laco chose the layers, they are merged only by recipes that otherwise just remove layers, with or without training
  afterwards. Other recipes compensate for the removed layers themselves and start from the original ones.
  """
  job, recipe = run.job, find_recipe(stage.recipe)
  trains = job.config.trains(stage.recipe)
  teacher = run.teacher.get() if trains and job.config.training.taught else None
  own_teacher = trains and job.config.training.taught and teacher is None
  start = fits.kept_fit(job, stage.name, recipe, choice)
  model = run.dense.take() if start is None or own_teacher else None
  spare = model if own_teacher else ()  # the teacher is needed until the last step
  free = functools.partial(memory.free, spare=spare)
  if start is None:
    batches, saved = job.batches if job.batches is not None else (), functools.partial(row_training.checkpoints, job)
    context = Context(model, batches, job.config, job.mode, job.log, saved, free)
    start = fits.fit(job, stage.name, recipe, context, choice)
    memory.free(model, (start, spare))
  elif own_teacher:
    start = fits.sharing(start, model)
  else:
    run.dense.drop()
  if not trains:
    return pruning.prune(start, choice.removed, free) if recipe.removes_last else start
  result = row_training.train_row(job, stage.name, recipe, start, choice, model if own_teacher else teacher, free)
  return pruning.prune(result, choice.removed, free) if recipe.removes_last else result


def export(run: Run, stage) -> dict:
  del stage
  return exporting.export(run)


def take_export(run: Run, stage, result: dict):
  del stage
  run.verified = result
