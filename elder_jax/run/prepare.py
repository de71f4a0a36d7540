"""Prepares a run and checks everything that can be checked early: work folder, model, texts, tasks, devices."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import folder as model_folder
from elder_jax.hf import verify
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import RunLog
from elder_jax.log import log
from elder_jax.model import lora
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Spec
from elder_jax.recipes import find_recipe
from elder_jax.run import inputs
from elder_jax.run import workdir
from elder_jax.run.checks import check_export
from elder_jax.run.checks import check_streams
from elder_jax.run.checks import checks_in_torch
from elder_jax.run.config import Config
from elder_jax.run.how_much import count_removed
from elder_jax.run.job import Job
from elder_jax.run.lineage import kept_layers
from elder_jax.run.stages import stages
from elder_jax.text import answers
from elder_jax.text import data
from elder_jax.text import identity
from elder_jax.text import perplexity
from elder_jax.text import training_text
from elder_jax.text import zero_shot
from elder_jax.training.batches import Batches


def prepare(config: Config) -> Job:
  """Checks the inputs before any long work, then claims the work folder, which `workdir.held` keeps from other runs.

  Raises InputError for anything that the run could not use.
  """
  work = config.path()
  if not config.paths.workdir:
    raise InputError('workdir', '', 'is missing; give a folder for the results.')
  hosts.leader_first(lambda: (workdir.make(config), workdir.claim_workdir(config)) if hosts.is_leader() else None)
  hosts.check_shared(work, 'workdir')
  source = hosts.leader_first(lambda: open_source(config.paths.model, work / 'source'))
  tokenizer_folder = None
  if config.paths.tokenizer:

    def find():
      return model_folder.find('tokenizer', config.paths.tokenizer, 'tokenizer')

    tokenizer_folder = hosts.leader_first(find)
  model_folder.small_files(source.files, tokenizer_folder)  # raises for a file that cannot be read
  num_removes = count_removed(config, source.spec, source.num_layers, source.dtype)
  check_recipes(config, source.spec, num_removes)
  _check_nothing_removed(config, num_removes)
  check_export(config, source, num_removes[0])
  teacher, layers_of_teacher = _open_teacher(config, source)
  mesh = sharding.make_mesh(config.computation.mesh)
  shardings = check_sizes(config, source.spec, source.num_layers, mesh)
  torch = hosts.leader_first(lambda: hosts.is_leader() and checks_in_torch(config, source, num_removes[0]))
  dense = abstract_decoder(source.spec, source.num_layers)
  checks_source = torch and not source.is_gguf and verify.use_torch(config.output.verify, pruning.num_params(dense))

  texts = _Texts(config, source, tokenizer_folder)
  texts.read_all(mesh, num_removes)

  def claim():
    if hosts.is_leader():
      read = texts.read | {inputs.named('model', config.paths.model): inputs.of_model(source)}
      inputs.check(work, read)
      workdir.record(config, read)

  hosts.leader_first(claim)
  return Job(
    config=config,
    source=source,
    num_removes=num_removes,
    batches=texts.batches,
    held_out=texts.held_out,
    windows=texts.windows,
    tokenizer=texts.tokenizer,
    tasks=texts.tasks,
    prompts=texts.prompts,
    mesh=mesh,
    shardings=shardings,
    mode=config.mode(),
    log=RunLog(work / 'metrics.jsonl'),
    torch=torch,
    checks_source=checks_source,
    tokenizer_folder=tokenizer_folder,
    teacher=teacher,
    kept_layers=layers_of_teacher,
  )


def check_recipes(config: Config, spec: Spec, num_removes: list[int]):
  """Raises InputError for a recipe that does not support this model, or needs more steps."""
  for name in config.recipes():
    recipe = find_recipe(name)
    if any(num_removes) and (why := recipe.refuses(spec)):
      raise InputError('recipe', name, why)
    one_by_one = recipe.removes_last and config.training.sequential
    if one_by_one and 0 < config.steps() < max(num_removes):
      raise InputError(
        'order',
        'sequential',
        f'{config.steps()} steps are too few to treat {max(num_removes)} layers one by one; raise --train_steps or '
        '--num_sequences, or use --order=joint.',
      )


def _check_nothing_removed(config: Config, num_removes: list[int]):
  trains = [r for r in config.recipes() if config.trains(r)]
  if any(not find_recipe(r).heals for r in trains) and not num_removes[0]:
    raise InputError(
      'recipe',
      config.removal.recipe,
      'no layer is removed, so the recipe would train the whole model; use elder_jax heal to train it, --recipe=none '
      '--compare= to copy it, or --num_remove, --ratio or --remove_layers to remove layers.',
    )
  if trains and (name := config.training.taught_by) and not config.paths.teacher and not all(num_removes):
    raise InputError(
      name,
      getattr(config.training, name),
      'no layer is removed, so the model would be distilled from itself; give the dense model as --teacher, or remove at '
      'least one layer.',
    )


def _open_teacher(config: Config, source: Source) -> tuple[Source | None, list[int] | None]:
  """Returns (--teacher, its layers that the model still has). Each is None if it is not given or not known."""
  name = config.paths.teacher
  if not name:
    return None, None
  here, there = user_path(name), user_path(config.paths.model)
  if name == config.paths.model or (here.exists() and there.exists() and os.path.samefile(here, there)):
    raise InputError('teacher', name, 'is --model itself; give the dense model that it was pruned from.')
  scratch = config.path() / 'source' / 'teacher'
  try:
    teacher = hosts.leader_first(lambda: open_source(name, scratch))
  except InputError as e:
    raise InputError('teacher', name, e.why) from e
  if teacher.spec.vocab_size != source.spec.vocab_size:
    raise InputError(
      'teacher',
      name,
      f'has a vocabulary of {teacher.spec.vocab_size} tokens, but --model has {source.spec.vocab_size}; give the dense '
      'model that --model was pruned from.',
    )
  check_streams(config, source, teacher)
  return teacher, kept_layers(config, source, teacher)


def check_sizes(config: Config, spec: Spec, num_layers: int, mesh: jax.sharding.Mesh) -> Decoder:
  """Returns the shardings of the model (sharding.for_model). Raises InputError for sizes that do not divide evenly."""
  abstract, flag = abstract_decoder(spec, num_layers), config.computation.mesh
  shardings = sharding.for_model(abstract, mesh, flag)
  lora.check(abstract, config.training.lora_rank)
  rows = config.data.batch_size // config.training.grad_accum
  sharding.check_batch(mesh, flag, rows, '--batch_size / --grad_accum')
  if config.evaluation.eval_data:
    sharding.check_batch(mesh, flag, config.evaluation.eval_batch_size, '--eval_batch_size')
  return shardings


@dataclasses.dataclass
class _Texts:
  """What a run reads in addition to the model; `read` holds the sha256 of each."""

  config: Config
  source: Source
  tokenizer_folder: pathlib.Path | None
  batches: Batches | None = None
  held_out: Batches | None = None
  windows: dict[str, perplexity.Windows] = dataclasses.field(default_factory=dict)
  tasks: Any = None
  prompts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
  read: dict[str, str] = dataclasses.field(default_factory=dict)
  tokenizer: Any = None

  def _load_tokenizer(self):
    if self.tokenizer is None:
      self.tokenizer = data.load_tokenizer(str(self.tokenizer_folder or self.source.files))
      name = inputs.named('tokenizer', self.config.paths.tokenizer or self.config.paths.model)
      self.read[name] = identity.of_tokenizer(self.tokenizer)

  def read_train_data(self, mesh: jax.sharding.Mesh):
    settings = self.config.data
    if not settings.train_data:
      raise InputError('train_data', '', 'is missing; give a text to choose layers with and to train on.')
    self._load_tokenizer()
    self._check_length('seq_len', settings.seq_len)
    shared = self._shared_cache()

    def read():
      of_model = self._bos_first, self.source.spec.vocab_size
      return training_text.open_text(settings, self.tokenizer, *of_model, self.config.validates(), shared)

    text = hosts.leader_first(read)  # process 0 writes the tokens, the others read them
    self.read |= {inputs.named('train_data', source): content for source, content in text.read.items()}
    seed = settings.seed if settings.shuffle else None
    self.batches = Batches(text.rows, settings.batch_size, seed, mesh)
    if text.held_out:
      self.held_out = Batches(text.held_out, settings.batch_size, None, mesh)

  def read_all(self, mesh: jax.sharding.Mesh, num_removes: list[int]):
    stages_of_run = stages(self.config, num_removes)
    if self.config.validates() or any(stage.trains_on_text for stage in stages_of_run):
      self.read_train_data(mesh)
    self.read_eval_data()
    self.load_tasks()
    self.read_prompts()

  def _shared_cache(self) -> pathlib.Path | None:
    """The token folder of a run with several processes, which must all see it. None for a single process."""
    if jax.process_count() == 1:
      return None
    given = self.config.data.token_cache
    folder = user_path(given) if given else self.config.path() / 'tokens'
    if hosts.is_leader():
      folder.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(folder, 'token_cache' if given else 'workdir')
    return folder

  def read_eval_data(self):
    settings = self.config.evaluation
    for name, text in settings.eval_data.items():
      self._load_tokenizer()
      bos, first = self._bos()
      self._check_length('eval_seq_len', settings.eval_seq_len)
      setting, column = f'eval_data={name}', self.config.data.text_column
      corpus = data.tokenise(setting, text, column, self.tokenizer, bos == 'tokenizer')
      self.read[inputs.named(setting, text)] = corpus.sha256
      windows = perplexity.make_windows(corpus, setting, settings.eval_seq_len, settings.eval_tokens, bos, first)
      self._check_tokens(windows.tokens_NT, setting, text)
      self.windows[name] = windows

  def load_tasks(self):
    settings = self.config.evaluation
    if settings.tasks:
      self._load_tokenizer()
      self.tasks = zero_shot.load_tasks(list(settings.tasks), settings.tasks_dir)
      name = inputs.named('tasks_dir', settings.tasks_dir or ','.join(settings.tasks))
      self.read[name] = inputs.of_tasks(self.tasks, settings.tasks_dir)

  @property
  def _bos_first(self) -> bool:
    return getattr(self.source.family, 'BOS_FIRST', False)

  def read_prompts(self):
    """Raises InputError for prompts of the user that the model cannot answer; skips the built-in ones."""
    settings, source = self.config.evaluation, self.source
    if not settings.asks_prompts:
      return
    if self.tokenizer is None:
      log('skipping --prompts: this run reads no text and loads no model')
      return
    texts = answers.read_prompts(settings.prompts)
    rows = answers.encode(texts, self.tokenizer, self._bos()[1])
    if why := answers.why_not(rows, settings.answer_tokens, source.spec.vocab_size, source.context_length):
      if settings.prompts:
        raise InputError('prompts', settings.prompts, f'{why}; use other prompts or fewer --answer_tokens.')
      log(f'skipping the prompts: {why}')
      return
    self.prompts = dict(zip(texts, rows))
    if settings.prompts:
      self.read[inputs.named('prompts', settings.prompts)] = identity.of_files([user_path(settings.prompts)])

  def _bos(self) -> tuple[str, int | None]:
    return data.bos_rule(self.config.data.bos, self._bos_first, self.tokenizer)

  def _check_length(self, setting: str, length: int):
    """Raises InputError for a length beyond the model's learned or tabulated positions."""
    if 0 < self.source.spec.most_positions < length:
      raise InputError(
        setting, length, f'the model has only {self.source.spec.most_positions} positions; use at most that many.'
      )

  def _check_tokens(self, rows_NT: np.ndarray, setting: str, text: str):
    if (largest := int(rows_NT.max())) >= (known := self.source.spec.vocab_size):
      raise InputError(
        setting,
        text,
        f"the tokenizer produced token {largest}, but the model has {known} tokens; give the model's own as --tokenizer.",
      )
