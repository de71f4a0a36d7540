"""The method, top to bottom: load → dense evaluation → choice of layers → recipe → evaluate → export → report."""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
import tempfile
import time

import jax
import numpy as np

from elder_jax import log as log_lib
from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.devices import preemption
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import disk_is_full
from elder_jax.errors import reason
from elder_jax.hf import checkpoint_hf
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.methods import auto
from elder_jax.methods import elder
from elder_jax.methods import importance
from elder_jax.methods import laco as laco_lib
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.recipes import absorb
from elder_jax.run import prepare as prepare_lib
from elder_jax.run import report as report_lib
from elder_jax.run import unused
from elder_jax.run import workdir
from elder_jax.run.config import TRAINED
from elder_jax.run.config import Config
from elder_jax.run.plan import compile as plan
from elder_jax.run.plan import programs as programs_lib
from elder_jax.run.prepare import Run
from elder_jax.run.prepare import load
from elder_jax.run.prepare import prepare
from elder_jax.text import generation
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.text import zero_shot
from elder_jax.training import regularize
from elder_jax.training.checkpoints import Checkpoints

# What these choose for n layers is not the beginning of what they choose for more.
CHOOSE_ANEW = ('auto', 'uidl', 'cosine_block', 'last', 'laco')


def run(config: Config) -> dict:
  """Does the whole job in config.workdir and returns the report. Started again, it resumes."""
  config.check()
  with workdir.held(config):
    hosts.lead_first(lambda: workdir.claim(config) if hosts.leads() else None)
    if report := workdir.finished(config):
      log_lib.say(f'{config.path()} holds a finished run; its report follows, its inputs are not read again')
      return report
    job = prepare(config)
    with workdir.noting_failure(config), jax.set_mesh(job.mesh):
      rehearse(job)
      preemption.listen_to_ctrl_c()
      return _run(job)


def rehearse(job: Run):
  """Makes the report and all that is made of it with made-up figures: what fails here would fail after all the work."""
  if not hosts.leads():
    return
  ppl = dict.fromkeys(job.windows, 10.0)
  figures = {'ppl': ppl, 'tasks': {task: {'acc': 0.5} for task in job.config.task_names()}}
  ways = itertools.product(job.config.methods(), job.num_removes, job.config.recipes())
  rows = [{'method': m, 'recipe': r, 'removed': list(range(n)), **figures} for m, n, r in ways]
  choices = {(m, n): {'chosen': list(range(n))} for m in job.config.methods() for n in job.num_removes}
  report = make_report(job, figures, choices, rows) | {'verify': {}, 'seconds': {}, 'peak_bytes': None}
  with tempfile.TemporaryDirectory() as folder:
    write_reports(job, report, pathlib.Path(folder))
    report_lib.model_card(report, dataclasses.asdict(job.config))


def _run(job: Run) -> dict:
  config, work, seconds = job.config, job.config.path(), {}
  stage = functools.partial(_stage, work, seconds)
  for line in unused.told(config):
    log_lib.say(line)

  if not job.copies:
    plan.check(job, log_lib.say)
  model = Dense(lambda: None if job.copies else _load(job, seconds))
  if hosts.agree(job.checks_source):
    stage('source', 'check_source', lambda: check_source(job, model.get()))
  dense = stage('dense', 'dense', lambda: measure(job, model.get(), 'dense'))

  # The first method, number of layers and --recipe are what is exported: its model is the last to be made.
  choices = _choose_all(job, model, stage)
  rivals = [(method, n, recipe) for method, n in choices for recipe in config.recipes()]
  exported = *next(iter(choices)), config.recipe
  rows, pruned, choice = [], None, None
  for method, n, recipe in sorted(rivals, key=lambda rival: rival == exported):
    pruned = None  # of the row before: its memory is needed now
    choice = choices[method, n]
    name = recipe if len(rivals) == len(config.recipes()) else f'{method}-{n}-{recipe}'
    log_lib.say(f'{name}: removing layers {sorted(choice["chosen"])} (0-based) of {job.source.num_layers}')
    checkpoints = _checkpoints(config, name, config.steps())
    measured = hosts.agree(hosts.leads() and _saved(work / 'stages' / f'{name}.json') is not None)
    last = (method, n, recipe) == exported
    if not job.copies and (last or not measured):
      model.get()  # if need be it is loaded now, in time of its own
      # The row uses the dense model up, the next one loads it again: it would take the place that training needs.
      pruned, taken = _timed(lambda: apply_recipe(job, model.take(), choice, recipe, checkpoints, name, uses_up=True))
      seconds.setdefault(f'train_{name}', taken)
    figures = stage(name, f'evaluate_{name}', lambda: measure(job, pruned, name))
    rows.append({'method': method, 'recipe': recipe, 'removed': sorted(choice['chosen']), **figures})
    if not last:
      checkpoints.clear()

  report = make_report(job, dense, choices, rows)
  report['verify'], seconds['export'] = _timed(lambda: export(job, pruned, report))
  report['seconds'] = {k: round(v, 1) for k, v in seconds.items()}
  report['peak_bytes'] = report_lib.peak_bytes()  # of this process, which may have resumed where another stopped
  if hosts.leads():
    write_reports(job, report, work)
    report_lib.write_json(work / 'report.json', report)
    shutil.rmtree(work / 'checkpoints', ignore_errors=True)
  hosts.wait('report')
  return report


def make_report(job: Run, dense: dict, choices: dict, rows: list[dict]) -> dict:
  """report.json but for what is known at the very end: verify, seconds, peak_bytes.

  Args:
    dense: of `measure`.
    choices: {(method, number of layers): choice}, that of the exported model first.
    rows: that of the exported model last.
  """
  config, (method, choice) = job.config, next((method, choice) for (method, _), choice in choices.items())
  removed = choice['chosen']
  kept = pruning.kept_layers(job.source.num_layers, removed)
  return {
    'schema': report_lib.SCHEMA,
    'model': config.model,
    'num_layers': job.source.num_layers,
    'removed': sorted(removed),
    'order': removed,
    'kept': kept,
    'method': method,
    'recipe': config.recipe,
    'gates': choice.get('gates', []),
    'choices': [{'method': method, 'num_remove': n, **choice} for (method, n), choice in choices.items()],
    'ppl': {c: {'dense': dense['ppl'][c], 'pruned': rows[-1]['ppl'][c]} for c in job.windows},
    'tasks': {'dense': dense['tasks'], 'pruned': rows[-1]['tasks']},
    'rows': rows,
    'corpora': {c: w.about for c, w in job.windows.items()},
    'params': {'dense': _num_params(job, range(job.source.num_layers)), 'pruned': _num_params(job, kept)},
    'steps': config.steps() if config.recipe in TRAINED else 0,
    'tokens_per_step': config.batch_size * config.seq_len,
    'versions': report_lib.versions(),
    'device': report_lib.device(),
  }


def write_reports(job: Run, report: dict, folder: pathlib.Path):
  """report.md and, of several depths, the plot. One that cannot be made costs nothing but itself."""
  if len(job.num_removes) > 1 and job.windows:
    _cosmetic('sweep.svg', lambda: report_lib.plot(report, folder / 'sweep.svg'))
  _cosmetic('report.md', lambda: log_lib.write_whole(folder / 'report.md', report_lib.markdown(report)))


def _cosmetic(name: str, write: Callable[[], None]):
  try:
    write()
  except Exception as e:  # of any kind  # noqa: BLE001
    if disk_is_full(e):
      raise
    log_lib.say(f'{name} could not be written ({reason(e)}); nothing else is missing')


class Dense:
  """The model as it was loaded, there as long as it is needed; where it is needed once more it is loaded again."""

  def __init__(self, load: Callable[[], Decoder]):
    self._load, self._model = load, None

  def get(self) -> Decoder:
    if self._model is None:
      self._model = self._load()
    return self._model

  def take(self) -> Decoder:
    """For a caller who will use the arrays up: nobody else has the model then."""
    model, self._model = self.get(), None
    return model


def _load(job: Run, seconds: dict) -> Decoder:
  config = job.config
  log_lib.say(f'loading {config.model}, {job.source.num_layers} layers, in {config.dtype} on {report_lib.device()}')
  model, taken = _timed(lambda: load(job))
  seconds['load'] = seconds.get('load', 0) + taken
  return model


def measure(job: Run, model: Decoder, name: str) -> dict:
  """{'ppl': {corpus: perplexity}, 'tasks': as zero_shot.run has it}.

  Tasks that fail on the dense model end the run, since nothing is lost yet; after that they cost a row its figures.
  """
  figures = {'ppl': perplexities(job, model, name), 'tasks': {}}
  if job.tasks:
    context = zero_shot.context_length(job.source.config, job.tokenizer)
    try:
      figures['tasks'] = zero_shot.run(
        model,
        job.tokenizer,
        job.tasks,
        job.mode,
        job.config.eval_batch_size,
        context,
        _put(job),
        job.config.task_limit or None,
        generation.eos_ids(job.source),
        log_lib.Progress(f'zero-shot tasks of {name}'),
      )
    except InputError as e:
      if name == 'dense':
        raise
      log_lib.say(f'{name} has no figures of tasks: {e}')
  return figures


def _put(job: Run) -> Callable:
  """A host array onto the devices; before each batch of an evaluation a run that is told to stop does so."""

  def put(array):
    preemption.check()
    return sharding.put_batch(array, job.mesh)

  return put


class _Batches(list):
  """Batches; a run that is told to stop while it goes through them does so."""

  def __iter__(self):
    for batch in super().__iter__():
      preemption.check()
      yield batch


def _checkpoints(config: Config, stage: str, steps: int) -> Checkpoints:
  folder = config.path() / 'checkpoints' / stage
  return Checkpoints(folder, config.checkpoint_every, steps, config.checkpoint_minutes, config.keep_checkpoints)


def perplexities(job: Run, model: Decoder, name: str) -> dict[str, float]:
  result = {}
  for corpus, windows in job.windows.items():
    progress = log_lib.Progress(f'perplexity of {name} on {corpus}')
    result[corpus] = perplexity_lib.perplexity(
      model, windows, job.mode, job.config.eval_batch_size, _put(job), progress
    )
    log_lib.say(f'perplexity of {name} on {corpus}: {result[corpus]:.3f}')
  return result


def _choose_all(job: Run, model: Dense, stage: Callable) -> dict[tuple[str, int], dict]:
  """{(method, number of layers): choice}. A method whose order holds for any number is asked once, for the most."""
  choices = {}
  for method in job.config.methods() if job.config.remove_layers is None else ['given']:
    for n in job.num_removes:
      most = n if method in CHOOSE_ANEW else max(job.num_removes)
      name = 'gates' if method in ('elder', 'given') else f'choose-{method}-{most}'
      choices[method, n] = first(stage(name, name, lambda: choose_layers(job, model.get(), method, most)), n)
  return choices


def choose_layers(job: Run, model: Decoder, method: str, num_remove: int, steps: int | None = None) -> dict:
  """{'chosen': layers in the order of their choice, and what the method says of them}.

  The latter is 'gates', all gates at the end of each round, for elder, 'candidates', the best first, each with its own
  scores, for auto, 'merges' for laco, 'scores' for others.

  Args:
    steps: batches that a method other than elder and auto reads; unset: --score_steps.
  """
  config = job.config
  if method == 'given':
    return {'chosen': config.layers_given(), 'gates': []}
  if not num_remove:
    return {'chosen': [], 'gates': []}
  if method == 'elder':
    return _learn_gates(job, model, num_remove)
  if method == 'auto':
    return _judge(job, model, num_remove)
  log_lib.say(f'choosing layers by {method}')
  batches = _Batches(job.batch(i) for i in range(steps or config.score_steps))
  if method == 'laco':
    collapsed = laco_lib.laco(model, num_remove, batches, job.mode)
    return {'chosen': collapsed.removed, 'merges': [list(group) for group in collapsed.merges]}
  choice = importance.choose(method, model, num_remove, batches, job.mode, config.seed)
  return {'chosen': choice.removed, 'scores': choice.scores}


def _judge(job: Run, model: Decoder, num_remove: int) -> dict:
  steps = auto.steps(job.config)
  part = lambda method: math.ceil(auto.CANDIDATES[method] * steps)
  found = {m: choose_layers(job, model, m, num_remove, part(m)) for m in auto.methods(model.num_layers, num_remove)}
  choices = {method: choice['chosen'] for method, choice in found.items()}
  fit, held_out = (_Batches(job.batch(i) for i in range(begin, begin + steps)) for begin in (0, steps))
  say = lambda c: log_lib.say(f'without layers {sorted(c.removed)}, which {c.method} chooses: loss {c.loss:.4f}')
  candidates = auto.judge(model, choices, fit, held_out, job.mode, say)
  told = [dataclasses.asdict(c) | {'scores': found[c.method]['scores']} for c in candidates]
  return {'chosen': candidates[0].removed, 'candidates': told}


def first(choice: dict, num_remove: int) -> dict:
  """The choice of the first `num_remove` of the chosen layers."""
  return choice | {'chosen': choice['chosen'][:num_remove]}


def _learn_gates(job: Run, model: Decoder, num_remove: int) -> dict:
  config = job.config
  settings = prepare_lib.gate_settings(config, model.num_layers, num_remove)
  total = settings.steps * (settings.num_remove if settings.iterative else 1)
  progress = log_lib.Progress('stage 1, gates')
  began = []

  def log(round_, step, values):
    if not began:
      began.append(job.log.begin('gates', step))
    job.log.write('gates', step, values, round=round_)
    progress(step + 1, total, f'round {round_ + 1}, loss {values["loss"]:.4f}')

  checkpoints = _checkpoints(config, 'gates', total)
  chosen, history = elder.learn(model, settings, job.mode, job.batch, log, checkpoints)
  return {'chosen': chosen, 'gates': history}


def apply_recipe(
  job: Run,
  model: Decoder,
  choice: dict,
  recipe: str,
  checkpoints: Checkpoints | None = None,
  name: str = '',
  uses_up: bool = False,
) -> Decoder:
  """The pruned model by one of the recipes; all of them see the same steps and batches.

  Layers that were chosen by laco are merged where the recipe just removes layers, before or without training; the
  other recipes have their own way of keeping what the layers did, and start from the layers as they were.

  Args:
    choice: of `choose_layers`.
    name: of the run in metrics.jsonl; unset: the recipe.
    uses_up: the arrays of `model` are given back as soon as they are not needed; else it is not changed.
  """
  config, removed, name = job.config, choice['chosen'], name or recipe
  kind, trained = recipe.removesuffix('_then_train'), programs_lib.is_trained(config, recipe)
  spare = () if uses_up and not (trained and config.distill) else model  # a teacher is needed up to the last step
  free = functools.partial(memory.free, spare=spare)
  if kind in ('absorb', 'replace_linear'):
    # The batches that training sees, or would see, in its first pass: no more tokens than other recipes have.
    one_pass = config.num_sequences // config.batch_size
    batches = _Batches(job.batch(i) for i in range(min(config.steps() or one_pass, one_pass)))
    refit = {'absorb': absorb.absorb, 'replace_linear': absorb.replace_linear}[kind]
    start = refit(model, removed, batches, job.mode, _say_refit, free)
  elif recipe == 'regularize' and trained:
    start = pruning.with_gates(model, 1.0)
  else:
    start = laco_lib.merge(model, choice['merges']) if 'merges' in choice else pruning.prune(model, removed, free)
  memory.free(model, (start, spare))
  if not trained:
    return start

  settings = prepare_lib.train_settings(config)
  progress = log_lib.Progress(f'training, {name}')
  began = []

  def log(step, values):
    if not began:
      began.append(job.log.begin(name, step))
    job.log.write(name, step, values)
    progress(step + 1, settings.steps, f'loss {values["loss"]:.4f}, lm {values["lm_loss"]:.4f}')

  penalised = removed if recipe == 'regularize' else []
  dtype = lora.merged_dtype(config.dtype, config.export_dtype or job.source.dtype)
  result = regularize.fit(start, penalised, settings, job.mode, job.batch, log, checkpoints, model, dtype, free)
  return pruning.prune(result, removed, free) if recipe == 'regularize' else result


def _say_refit(layer: int, end: int, before: float, after: float):
  log_lib.say(
    f'layer {layer} takes over what layers {layer + 1} to {end - 1} did: squared error of the stream, as a part of '
    f'its square, {before:.3g} → {after:.3g}'
  )


def _num_params(job: Run, kept) -> int:
  return pruning.num_params(checkpoint_hf.abstract(job.source.spec.with_layers(list(kept)), len(kept)))


def some_tokens(job: Run) -> np.ndarray:
  """One row of the run's own text; where it has none any tokens will do."""
  if job.windows:
    return next(iter(job.windows.values())).tokens_NT[:1, :128]
  if job.rows_NT is not None:
    return job.rows_NT[:1, :128]
  return np.random.default_rng(0).integers(0, job.source.spec.vocab_size, (1, 32), np.int32)


def check_source(job: Run, model: Decoder | None) -> dict:
  """verify.check_source; of a run that only copies the model is loaded for it."""
  model = load(job) if model is None else model
  figures = verify.check_source(job.source, model, job.config.dtype, some_tokens(job)[:, :32], job.torch)
  if why := figures.get('torch_error'):
    log_lib.say(f'the model as it is could not be checked in PyTorch: {why}')
  return figures


def export(job: Run, pruned: Decoder | None, report: dict) -> dict:
  """Writes the pruned model to workdir/export, checks it, and only then gives it that name. Returns verify's figures.

  Args:
    pruned: unset, the source's tensors are copied.
    report: of `make_report`.
  """
  config, source, work, kept = job.config, job.source, job.config.path(), report['kept']
  temporary, final = work / 'export.partial', work / 'export'
  log_lib.say(f'writing and checking {final}')
  # A copy keeps each tensor's type, where they differ.
  dtype = config.export_dtype or ('' if job.copies else source.dtype)
  pieces_of = checkpoint_hf.from_source(source, kept) if job.copies else checkpoint_hf.from_model(pruned)
  if hosts.leads():
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shard_bytes = int(config.shard_gb * 1e9)
    hashes = checkpoint_hf.save(pieces_of, source, kept, temporary, dtype, shard_bytes, job.tokenizer_folder)
  elif not job.copies:
    checkpoint_hf.take_part(pieces_of, source, kept)
  hosts.wait('export written')
  tokens_BT = some_tokens(job)
  if job.copies:
    figures = verify.check_copy(temporary, source.spec.with_layers(kept), len(kept), tokens_BT, job.torch)
  else:
    # Nothing comes after this: the pruned model makes room for the one that is read back.
    figures = verify.check(temporary, pruned, dtype, tokens_BT, job.torch, job.shardings, memory.free)
  if why := figures.get('torch_error'):
    log_lib.say(f'the export is whole, but it could not be checked in PyTorch: {why}')
  hosts.wait('export checked')
  if hosts.leads():
    card = temporary / 'README.md'
    report = report | {'verify': figures}
    _cosmetic('README.md', lambda: log_lib.write_whole(card, report_lib.model_card(report, dataclasses.asdict(config))))
    manifest.write(temporary, hashes)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
  return figures


def _stage(work: pathlib.Path, seconds: dict, name: str, key: str, compute: Callable[[], dict]) -> dict:
  """compute(), or what an earlier run in this work folder had of it."""
  preemption.check()
  path = work / 'stages' / f'{name}.json'
  saved = hosts.agree(_saved(path) if hosts.leads() else None)
  if not saved:
    result, taken = _timed(compute)
    saved = hosts.agree({'result': result, 'seconds': taken})
    if hosts.leads():
      path.parent.mkdir(exist_ok=True)
      report_lib.write_json(path, saved)
  seconds[key] = saved['seconds']
  return saved['result']


def _saved(path: pathlib.Path) -> dict | None:
  if not path.exists():
    return None
  try:
    saved = json.loads(path.read_text(encoding='utf-8'))
    return {'result': saved['result'], 'seconds': saved['seconds']}
  except (OSError, ValueError, TypeError, KeyError) as e:
    log_lib.say(f'{path}: cannot be read ({reason(e)}); this stage is done again')
    return None


def _timed(compute: Callable):
  start = time.monotonic()
  result = compute()
  return result, time.monotonic() - start
