"""The method, top to bottom: load → dense evaluation → gates → regularise → prune → evaluate → export → report."""

from collections.abc import Callable
import dataclasses
import decimal
import functools
import json
import os
import pathlib
import shutil
import time

import jax
import numpy as np

from elder_jax import checkpoint_hf
from elder_jax import data
from elder_jax import evaluate
from elder_jax import gates
from elder_jax import metrics
from elder_jax import prune
from elder_jax import regularize
from elder_jax import report as report_lib
from elder_jax import sharding
from elder_jax import verify
from elder_jax.checkpoint import Checkpoints
from elder_jax.config import Config
from elder_jax.errors import InputError
from elder_jax.model import Decoder
from elder_jax.model import Mode

# What a run may change when it is started again in its work folder.
_FREE_ON_RESUME = ('workdir', 'checkpoint_every', 'verify', 'mesh')


@dataclasses.dataclass(frozen=True)
class Run:
  """All that was checked before the first long step."""

  config: Config
  source: checkpoint_hf.Source
  num_remove: int
  rows_NT: np.ndarray | None  # the packed training sequences
  windows: dict[str, evaluate.Windows]
  mesh: jax.sharding.Mesh
  mode: Mode
  log: metrics.Metrics

  @property
  def seed(self) -> int | None:
    return self.config.seed if self.config.shuffle else None

  def batch(self, step: int):
    return sharding.put_batch(data.batch(self.rows_NT, self.config.batch_size, step, self.seed), self.mesh)


def run(config: Config) -> dict:
  """Does the whole job in config.workdir and returns the report. Started again, it goes on where it was."""
  job = prepare(config)
  work, seconds = config.path(), {}
  stage = functools.partial(_stage, work, seconds)
  if (work / 'report.json').exists():
    metrics.say(f'{work} holds a finished run')
    return json.loads((work / 'report.json').read_text())

  metrics.say(f'loading {config.model}, {job.source.num_layers} layers, in {config.dtype} on {report_lib.device()}')
  model, seconds['load'] = _timed(lambda: load(job))
  dense = stage('dense', lambda: {'ppl': perplexities(job, model, 'dense')})
  choice = stage('gates', lambda: choose_layers(job, model))
  removed = choice['chosen']
  metrics.say(f'removing layers {sorted(removed)} (0-based) of {job.source.num_layers}')

  results, pruned = {}, None
  for recipe in config.recipes():
    checkpoints = Checkpoints(work / 'checkpoints' / recipe, config.checkpoint_every, config.steps())
    exported = recipe == config.recipe
    done = (work / 'stages' / f'{recipe}.json').exists()
    if exported or not done:
      pruned, taken = _timed(lambda: apply_recipe(job, model, removed, recipe, checkpoints))
      seconds.setdefault(f'train_{recipe}', taken)
    results[recipe] = stage(recipe, lambda: {'ppl': perplexities(job, pruned, report_lib.NAMES[recipe])})
    if not exported:
      checkpoints.clear()

  kept = prune.kept_layers(job.source.num_layers, removed)
  params = {'dense': prune.num_params(model), 'pruned': prune.num_params(pruned)}
  report = {
    'schema': report_lib.SCHEMA,
    'model': config.model,
    'num_layers': job.source.num_layers,
    'removed': sorted(removed),
    'order': removed,
    'kept': kept,
    'method': config.method if config.remove_layers is None else 'given',
    'recipe': config.recipe,
    'gates': choice['gates'],
    'ppl': {c: {'dense': dense['ppl'][c], 'pruned': results[config.recipe]['ppl'][c]} for c in job.windows},
    'recipes': {r: {'ppl': v['ppl']} for r, v in results.items()},
    'corpora': {c: w.about for c, w in job.windows.items()},
    'params': params,
    'steps': config.steps() if config.recipe != 'none' else 0,
    'tokens_per_step': config.batch_size * config.seq_len,
    'versions': report_lib.versions(),
    'device': report_lib.device(),
  }
  report['verify'], seconds['export'] = _timed(lambda: export(job, pruned, kept, report))
  report['seconds'] = {k: round(v, 1) for k, v in seconds.items()}
  (work / 'report.md').write_text(report_lib.markdown(report), encoding='utf-8')
  report_lib.write_json(work / 'report.json', report)
  shutil.rmtree(work / 'checkpoints', ignore_errors=True)
  return report


def prepare(config: Config) -> Run:
  """Refuses whatever can be refused before long work starts, then claims the work folder."""
  config.check()
  work = config.path()
  _claim(work, config)
  source = checkpoint_hf.open_source(config.model, work / 'source')
  num_remove = _num_remove(config, source.num_layers)
  mesh = sharding.make_mesh(config.mesh)
  abstract = jax.eval_shape(lambda: Decoder(source.spec, source.num_layers, jax.random.key(0)))
  sharding.for_model(abstract, mesh, config.mesh)
  sharding.check_batch(mesh, config.mesh, config.batch_size // config.grad_accum, '--batch_size / --grad_accum')
  if config.eval_data:
    sharding.check_batch(mesh, config.mesh, config.eval_batch_size, '--eval_batch_size')
  if config.verify == 'torch' and not verify.has_torch():
    raise InputError('--verify=torch: torch is not installed; install it or use --verify=auto.')

  scores = config.remove_layers is None and num_remove > 0
  trains = any(recipe != 'none' for recipe in config.recipes()) and config.steps() > 0
  rows_NT, windows = None, {}
  if (scores or trains) and not config.train_data:
    raise InputError('--train_data is missing: give a text to learn gates and to train on.')
  if scores or trains or config.corpora():
    tokenizer = data.load_tokenizer(config.tokenizer or str(source.files))
    if scores or trains:
      corpus = data.tokenise('--train_data', config.train_data, config.text_column, tokenizer)
      seed = config.seed if config.shuffle else None
      rows_NT = data.pack(corpus, '--train_data', config.seq_len, config.num_sequences, seed)
      _check_tokens(rows_NT, source, '--train_data')
    for name, text in config.corpora().items():
      flag = f'--eval_data={name}'
      special = config.eval_bos == 'tokenizer'
      corpus = data.tokenise(flag, text, config.text_column, tokenizer, special)
      windows[name] = evaluate.make_windows(
        corpus, flag, config.eval_seq_len, config.eval_tokens, config.eval_bos, tokenizer.bos_token_id
      )
      _check_tokens(windows[name].tokens_NT, source, flag)

  if jax.process_index() == 0:
    report_lib.write_json(work / 'config.json', dataclasses.asdict(config))
  mode = Mode(config.gate, config.penalty, config.penalty_scale, config.dtype, config.remat)
  return Run(config, source, num_remove, rows_NT, windows, mesh, mode, metrics.Metrics(work / 'metrics.jsonl'))


def _claim(work: pathlib.Path, config: Config):
  """Makes the work folder, or makes sure that it is this run's own."""
  try:
    work.mkdir(parents=True, exist_ok=True)
    probe = work / f'.writable-{os.getpid()}'
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise InputError(f'--workdir={config.workdir}: cannot be written ({e.strerror}); choose another folder.') from e
  try:
    before = checkpoint_hf.read_json(work / 'config.json')
  except InputError:  # missing, or broken
    before = {}
  if 'workdir' not in before:  # a model has a config.json, too
    if foreign := next((p.name for p in sorted(work.iterdir()) if p.name != 'source'), None):
      raise InputError(
        f'--workdir={config.workdir}: is not empty and not of an earlier run (it has {foreign}); choose another folder.'
      )
    return
  now = json.loads(json.dumps(dataclasses.asdict(config)))
  for key in now:
    if key not in _FREE_ON_RESUME and before.get(key) != now[key]:
      raise InputError(
        f'--workdir={config.workdir}: holds a run with --{key}={before.get(key)}, not {now[key]}; choose another folder.'
      )


def _num_remove(config: Config, num_layers: int) -> int:
  given = config.layers_given()
  if given is not None:
    if wrong := next((l for l in given if not 0 <= l < num_layers), None):
      raise InputError(f'--remove_layers: {wrong} is not a layer of this model, which has 0 to {num_layers - 1}.')
    if len(given) == num_layers:
      raise InputError('--remove_layers: names every layer of the model; leave one.')
    return len(given)
  n = config.num_remove
  if n is None:
    exact = decimal.Decimal(str(config.ratio)) * num_layers
    n = int(exact.to_integral_value(decimal.ROUND_HALF_UP))
  free = max(0, num_layers - config.protect_first - config.protect_last)
  if n > free:
    raise InputError(
      f'{n} layers are to be removed of {num_layers}, but --protect_first={config.protect_first} and '
      f'--protect_last={config.protect_last} leave {free} to choose from; ask for fewer or protect fewer.'
    )
  return n


def _check_tokens(rows_NT: np.ndarray, source: checkpoint_hf.Source, flag: str):
  if (largest := int(rows_NT.max())) >= source.spec.vocab_size:
    raise InputError(
      f'{flag}: the tokenizer made token {largest}, the model has {source.spec.vocab_size}; give its own by --tokenizer.'
    )


def load(job: Run) -> Decoder:
  model = jax.eval_shape(lambda: Decoder(job.source.spec, job.source.num_layers, jax.random.key(0)))
  return checkpoint_hf.load(job.source, job.config.dtype, sharding.for_model(model, job.mesh, job.config.mesh))


def perplexities(job: Run, model: Decoder, name: str) -> dict[str, float]:
  put = lambda a: sharding.put_batch(a, job.mesh)
  result = {}
  for corpus, windows in job.windows.items():
    progress = metrics.Progress(f'perplexity of {name} on {corpus}')
    result[corpus] = evaluate.perplexity(model, windows, job.mode, job.config.eval_batch_size, put, progress)
    metrics.say(f'perplexity of {name} on {corpus}: {result[corpus]:.3f}')
  return result


def choose_layers(job: Run, model: Decoder) -> dict:
  """{'chosen': layers in the order of their choice, 'gates': all gates at the end of each round}."""
  config = job.config
  if config.remove_layers is not None:
    return {'chosen': config.layers_given(), 'gates': []}
  if not job.num_remove:
    return {'chosen': [], 'gates': []}
  settings = gates.GateSettings(
    num_remove=job.num_remove,
    iterative=config.selection == 'iterative',
    steps=config.gate_steps,
    lr=config.gate_lr,
    lambda1=config.lambda1,
    candidates=tuple(range(config.protect_first, model.num_layers - config.protect_last)),
    clip=config.grad_clip,
    grad_accum=config.grad_accum,
  )
  total = settings.steps * (settings.num_remove if settings.iterative else 1)
  progress = metrics.Progress('stage 1, gates')
  job.log.begin('gates', 0)

  def log(round_, step, values):
    job.log.write('gates', step, values, round=round_)
    progress(step + 1, total, f'round {round_ + 1}, loss {values["loss"]:.4f}')

  chosen, history = gates.learn(model, settings, job.mode, job.batch, log)
  return {'chosen': chosen, 'gates': history}


def apply_recipe(
  job: Run, model: Decoder, removed: list[int], recipe: str, checkpoints: Checkpoints | None = None
) -> Decoder:
  """The pruned model by one of the recipes; all of them see the same layers, steps and batches. `model` is not changed."""
  if recipe == 'none' or not job.config.steps():
    return prune.prune(model, removed)
  config = job.config
  settings = regularize.TrainSettings(
    steps=config.steps(),
    lr=config.lr,
    lambda2=config.lambda2,
    lambda2_power=config.lambda2_power,
    sequential=config.order == 'sequential',
    trainable=config.trainable,
    warmup_ratio=config.warmup_ratio,
    weight_decay=config.weight_decay,
    clip=config.grad_clip,
    grad_accum=config.grad_accum,
  )
  progress = metrics.Progress(f'training, {report_lib.NAMES[recipe]}')
  began = []

  def log(step, values):
    if not began:
      began.append(job.log.begin(recipe, step))
    job.log.write(recipe, step, values)
    progress(step + 1, settings.steps, f'loss {values["loss"]:.4f}, lm {values["lm_loss"]:.4f}')

  if recipe == 'prune_then_train':
    # A copy-free start: the pruned arrays are new, and only they are trained.
    return regularize.fit(prune.prune(model, removed), [], settings, job.mode, job.batch, log, checkpoints)
  trained = regularize.fit(prune.with_gates(model, 1.0), removed, settings, job.mode, job.batch, log, checkpoints)
  return prune.prune(trained, removed)


def export(job: Run, pruned: Decoder, kept: list[int], report: dict) -> dict:
  """Writes the pruned model to workdir/export, checks it, and only then gives it that name. Returns verify's figures."""
  config, work = job.config, job.config.path()
  temporary, final = work / 'export.partial', work / 'export'
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  dtype = config.resolved_export_dtype()
  metrics.say(f'writing and checking {final}')
  checkpoint_hf.save(pruned, job.source, kept, temporary, dtype, int(config.shard_gb * 1e9))
  (temporary / 'README.md').write_text(model_card(job, report), encoding='utf-8')
  if job.windows:
    tokens_BT = next(iter(job.windows.values())).tokens_NT[:1, :128]
  elif job.rows_NT is not None:
    tokens_BT = job.rows_NT[:1, :128]
  else:  # no text was given: any tokens will do
    tokens_BT = np.random.default_rng(0).integers(0, job.source.spec.vocab_size, (1, 128), np.int32)
  torch = config.verify == 'torch' or (config.verify == 'auto' and verify.has_torch())
  figures = verify.check(temporary, pruned, dtype, tokens_BT, torch)
  shutil.rmtree(final, ignore_errors=True)
  os.replace(temporary, final)
  return figures


def model_card(job: Run, report: dict) -> str:
  name = pathlib.PurePath(report['model']).name
  text = (
    f'# {name}, {len(report["kept"])} of {report["num_layers"]} layers\n\n'
    f'Made from {report["model"]} by elder_jax, recipe `{report["recipe"]}`.\n'
    f'Removed layers (0-based, numbers of the original): {report["removed"]}. Kept: {report["kept"]}.\n'
  )
  return text + (f'\n{report_lib.table(report)}\n' if report['ppl'] else '')


def _stage(work: pathlib.Path, seconds: dict, name: str, compute: Callable[[], dict]) -> dict:
  """compute(), or what an earlier run in this work folder had of it."""
  path = work / 'stages' / f'{name}.json'
  if path.exists():
    saved = json.loads(path.read_text())
  else:
    result, taken = _timed(compute)
    saved = {'result': result, 'seconds': taken}
    path.parent.mkdir(exist_ok=True)
    report_lib.write_json(path, saved)
  seconds[name if name in ('dense', 'gates') else f'evaluate_{name}'] = saved['seconds']
  return saved['result']


def _timed(compute: Callable):
  start = time.monotonic()
  result = compute()
  return result, time.monotonic() - start
