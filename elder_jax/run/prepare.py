"""What a run needs and whatever can be refused before it: work folder, model, texts, tasks, devices."""

import dataclasses
import decimal
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from elder_jax import log as log_lib
from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.hf import checkpoint_hf
from elder_jax.hf import folder as model_folder
from elder_jax.hf import verify
from elder_jax.methods import auto
from elder_jax.methods import elder
from elder_jax.methods import importance
from elder_jax.methods import laco as laco_lib
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.model.decoder import Spec
from elder_jax.recipes import absorb
from elder_jax.run import inputs
from elder_jax.run import workdir
from elder_jax.run.config import TRAINED
from elder_jax.run.config import Config
from elder_jax.text import data
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.text import zero_shot
from elder_jax.training import regularize


@dataclasses.dataclass(frozen=True)
class Run:
  """All that was checked before the first long step."""

  config: Config
  source: checkpoint_hf.Source
  num_removes: list[int]  # the first is that of the exported model
  rows_NT: np.ndarray | None  # the packed training sequences
  windows: dict[str, perplexity_lib.Windows]
  tokenizer: object  # of transformers, where the run reads text
  tasks: object  # the harness's TaskDict, or None
  mesh: jax.sharding.Mesh
  shardings: Decoder  # of the parameters, whatever their number of layers
  mode: Mode
  log: log_lib.Metrics
  torch: bool  # this process checks the export in PyTorch, too
  checks_source: bool  # and the model as it is
  tokenizer_folder: pathlib.Path | None  # of --tokenizer, whose files the export has in place of the source's

  @property
  def copies(self) -> bool:
    """Layers are just taken out and nothing is measured: the model need not be in memory."""
    return self.config.recipes() == ['none'] and self.rows_NT is None and not self.windows and self.tasks is None

  @property
  def seed(self) -> int | None:
    return self.config.seed if self.config.shuffle else None

  def batch(self, step: int):
    return sharding.put_batch(data.batch(self.rows_NT, self.config.batch_size, step, self.seed), self.mesh)


def prepare(config: Config) -> Run:
  """Refuses whatever can be refused before long work starts, then claims the work folder.

  `workdir.held` keeps other runs out meanwhile.
  """
  config.check()
  work = config.path()
  hosts.lead_first(lambda: (workdir.make(config), workdir.claim(config)) if hosts.leads() else None)
  hosts.check_shared(work, '--workdir')
  source = hosts.lead_first(lambda: checkpoint_hf.open_source(config.model, work / 'source'))
  tokenizer_folder = None
  if config.tokenizer:
    tokenizer_folder = hosts.lead_first(lambda: model_folder.find('--tokenizer', config.tokenizer, 'tokenizer'))
  model_folder.small_files(source.files, tokenizer_folder)  # what the export needs can be read
  num_removes = count_removed(config, source.num_layers)
  _check_nothing_removed(config, num_removes)
  _check_export(config, source, num_removes[0])
  for recipe in config.recipes():
    if recipe.startswith(('absorb', 'replace_linear')) and any(num_removes):
      absorb.check(source.spec, recipe)
  if 'regularize' in config.recipes() and config.order == 'sequential' and 0 < config.steps() < max(num_removes):
    raise InputError(
      f'--order=sequential: {config.steps()} steps are not enough for {max(num_removes)} layers, one after another; give '
      'more (--train_steps, --num_sequences) or use --order=joint.'
    )
  mesh = sharding.make_mesh(config.mesh)
  shardings = check_sizes(config, source.spec, source.num_layers, mesh)
  torch = hosts.lead_first(lambda: hosts.leads() and _torch(config, source, num_removes[0]))
  dense = checkpoint_hf.abstract(source.spec, source.num_layers)
  checks_source = torch and not source.is_gguf and verify.use_torch(config.verify, pruning.num_params(dense))

  scores = config.remove_layers is None and any(num_removes)
  if scores and 'auto' in config.methods():
    auto.steps(config)
  trains = any(recipe in TRAINED for recipe in config.recipes()) and config.steps() > 0
  refits = any(recipe.startswith(('absorb', 'replace_linear')) for recipe in config.recipes()) and any(num_removes)
  reads = scores or trains or refits
  rows_NT, windows, tokenizer, tasks, read = None, {}, None, None, {}
  if reads and not config.train_data:
    raise InputError('--train_data is missing: give a text to choose layers by and to train on.')
  if reads or config.corpora() or config.task_names():
    tokenizer = data.load_tokenizer(str(tokenizer_folder or source.files))
    read[inputs.named('--tokenizer', config.tokenizer or config.model)] = inputs.of_tokenizer(tokenizer)
    bos, first = _bos(config, source, tokenizer)
    special = bos == 'tokenizer'
    if reads:
      _check_length(config, source, 'seq_len')
      corpus = data.tokenise('--train_data', config.train_data, config.text_column, tokenizer, special)
      read[inputs.named('--train_data', config.train_data)] = corpus.sha256
      seed = config.seed if config.shuffle else None
      rows_NT = data.pack(corpus, '--train_data', config.seq_len, config.num_sequences, seed, first)
      _check_tokens(rows_NT, source, '--train_data')
    for name, text in config.corpora().items():
      _check_length(config, source, 'eval_seq_len')
      flag = f'--eval_data={name}'
      corpus = data.tokenise(flag, text, config.text_column, tokenizer, special)
      read[inputs.named(flag, text)] = corpus.sha256
      windows[name] = perplexity_lib.make_windows(corpus, flag, config.eval_seq_len, config.eval_tokens, bos, first)
      _check_tokens(windows[name].tokens_NT, source, flag)
  if config.task_names():
    tasks = zero_shot.load_tasks(config.task_names(), config.tasks_dir)
    read[inputs.named('--tasks_dir', config.tasks_dir or config.tasks)] = inputs.of_tasks(tasks, config.tasks_dir)

  def claim():
    if hosts.leads():
      read[inputs.named('--model', config.model)] = inputs.of_model(source)
      inputs.check(work, read)
      workdir.record(config, read)

  hosts.lead_first(claim)
  log = log_lib.Metrics(work / 'metrics.jsonl')
  return Run(
    config,
    source,
    num_removes,
    rows_NT,
    windows,
    tokenizer,
    tasks,
    mesh,
    shardings,
    mode(config),
    log,
    torch,
    checks_source,
    tokenizer_folder,
  )


def _check_nothing_removed(config: Config, num_removes: list[int]):
  trains = set(config.recipes()) & set(TRAINED) and config.steps() > 0
  if trains and not num_removes[0]:
    raise InputError(
      f'--recipe={config.recipe}: no layer is removed, so that the whole model would be trained; use --recipe=none '
      '--compare= to copy it, or remove layers (--num_remove, --ratio or --remove_layers).'
    )
  if trains and config.distill and not all(num_removes):
    raise InputError(
      f'--distill={config.distill}: where no layer is removed it distils a model from itself; leave out 0.'
    )


def _check_export(config: Config, source: checkpoint_hf.Source, num_remove: int):
  """Raises InputError where the export could not be read back, or where there is no room for it."""
  kept = list(range(source.num_layers - num_remove))
  spec = source.spec.with_layers(kept)
  written = checkpoint_hf.pruned_config(source.family, source.config, kept, config.export_dtype)
  if checkpoint_hf.architecture(config.model, written) != (spec, len(kept)):
    raise InputError(
      f'--model={config.model}: its config.json cannot be cut to {len(kept)} layers; please report this with the file.'
    )
  params = pruning.num_params(checkpoint_hf.abstract(spec, len(kept)))
  needed = params * jnp.dtype(config.export_dtype or source.dtype).itemsize
  if (free := shutil.disk_usage(config.path()).free) < needed:
    raise InputError(
      f'--workdir={config.workdir}: the export needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; free some '
      'space or choose another folder.'
    )


def _torch(config: Config, source: checkpoint_hf.Source, num_remove: int) -> bool:
  """Whether the export is checked in PyTorch, after that was tried on the config.json that it will have."""
  kept = list(range(source.num_layers - num_remove))
  params = pruning.num_params(checkpoint_hf.abstract(source.spec.with_layers(kept), len(kept)))
  if not verify.use_torch(config.verify, params):
    return False
  why = verify.why_torch_cannot(checkpoint_hf.pruned_config(source.family, source.config, kept, config.export_dtype))
  if why and config.verify == 'torch':
    raise InputError(f'--verify=torch: transformers cannot make the pruned model ({why}); use --verify=jax.')
  if why:
    log_lib.say(f'the check in PyTorch is left out: transformers cannot make the pruned model ({why})')
  return not why


def check_sizes(config: Config, spec: Spec, num_layers: int, mesh: jax.sharding.Mesh) -> Decoder:
  """The model of shardings (sharding.for_model). Raises InputError for what the devices do not divide."""
  abstract = checkpoint_hf.abstract(spec, num_layers)
  shardings = sharding.for_model(abstract, mesh, config.mesh)
  lora.check(abstract, config.lora_rank)
  sharding.check_batch(mesh, config.mesh, config.batch_size // config.grad_accum, '--batch_size / --grad_accum')
  if config.eval_data:
    sharding.check_batch(mesh, config.mesh, config.eval_batch_size, '--eval_batch_size')
  return shardings


def mode(config: Config) -> Mode:
  return Mode(config.gate, config.penalty, config.penalty_scale, config.dtype, config.remat)


def gate_settings(config: Config, num_layers: int, num_remove: int) -> elder.GateSettings:
  return elder.GateSettings(
    num_remove=num_remove,
    iterative=config.selection == 'iterative',
    steps=config.gate_steps,
    lr=config.gate_lr,
    lambda1=config.lambda1,
    candidates=tuple(range(config.protect_first, num_layers - config.protect_last)),
    clip=config.grad_clip,
    grad_accum=config.grad_accum,
  )


def train_settings(config: Config) -> regularize.TrainSettings:
  return regularize.TrainSettings(
    steps=config.steps(),
    lr=config.lr,
    lambda2=config.lambda2,
    lambda2_power=config.lambda2_power,
    sequential=config.order == 'sequential',
    anneal=config.anneal,
    distill=config.distill,
    trainable=config.trainable,
    warmup_ratio=config.warmup_ratio,
    weight_decay=config.weight_decay,
    clip=config.grad_clip,
    grad_accum=config.grad_accum,
    optimizer=config.optimizer,
    moment_dtype=config.moment_dtype,
    lora_rank=config.lora_rank,
    lora_alpha=2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
    seed=config.seed,
  )


def count_removed(config: Config, num_layers: int) -> list[int]:
  """How many layers go, of the exported model first; several where --ratio has several. Raises InputError."""
  given = config.layers_given()
  if given is not None:
    if wrong := next((l for l in given if not 0 <= l < num_layers), None):
      raise InputError(f'--remove_layers: {wrong} is not a layer of this model, which has 0 to {num_layers - 1}.')
    if len(given) == num_layers:
      raise InputError('--remove_layers: names every layer of the model; leave one.')
    return [len(given)]
  if config.num_remove is not None:
    counts = [config.num_remove]
  else:
    exact = [ratio * num_layers for ratio in config.ratios()]
    counts = list(dict.fromkeys(int(n.to_integral_value(decimal.ROUND_HALF_UP)) for n in exact))
  free = max(0, num_layers - config.protect_first - config.protect_last)
  for n in counts:
    if n >= num_layers:
      raise InputError(f'{n} layers are to be removed of {num_layers}; leave one (--num_remove or --ratio).')
    for method in config.methods():
      if method == 'laco':
        laco_lib.check(num_layers, n)
      elif method == 'elder' and n > free:
        raise InputError(
          f'{n} layers are to be removed of {num_layers}, but --protect_first={config.protect_first} and '
          f'--protect_last={config.protect_last} leave {free} to choose from; ask for fewer or protect fewer.'
        )
      elif method not in ('auto', 'elder'):  # of auto's candidates one can always choose from all layers
        importance.check(method, num_layers, n)
  return counts


def _bos(config: Config, source: checkpoint_hf.Source, tokenizer) -> tuple[str, int | None]:
  """--bos as it is meant for this model, and the token that each window begins with, if any."""
  bos = config.bos
  if bos == 'auto':
    bos = 'window' if getattr(source.family, 'BOS_FIRST', False) else 'tokenizer'
  if bos == 'window' and tokenizer.bos_token_id is None:
    raise InputError('--bos=window: the tokenizer has no begin-of-sequence token; use --bos=tokenizer.')
  return bos, tokenizer.bos_token_id if bos == 'window' else None


def _check_length(config: Config, source: checkpoint_hf.Source, flag: str):
  """Learned positions end somewhere."""
  if 0 < source.spec.num_positions < (length := getattr(config, flag)):
    raise InputError(
      f'--{flag}={length}: this model has learned {source.spec.num_positions} positions; give at most that many.'
    )


def _check_tokens(rows_NT: np.ndarray, source: checkpoint_hf.Source, flag: str):
  if (largest := int(rows_NT.max())) >= source.spec.vocab_size:
    raise InputError(
      f'{flag}: the tokenizer made token {largest}, the model has {source.spec.vocab_size}; give its own by --tokenizer.'
    )


def load(job: Run) -> Decoder:
  return checkpoint_hf.load(job.source, job.config.dtype, job.shardings)
