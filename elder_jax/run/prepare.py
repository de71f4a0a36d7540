"""What a run needs, and whatever can be refused before it: work folder, model, texts, tasks, devices."""

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
  """Refuses whatever can be refused before long work starts, then claims the work folder.

  `workdir.held` keeps other runs out meanwhile.
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
  model_folder.small_files(source.files, tokenizer_folder)  # what the export needs can be read
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
  """Raises InputError for a recipe that cannot work on this model, or with so few steps."""
  for name in config.recipes():
    recipe = find_recipe(name)
    if any(num_removes) and (why := recipe.refuses(spec)):
      raise InputError('recipe', name, why)
    in_turn = recipe.removes_last and config.training.sequential
    if in_turn and 0 < config.steps() < max(num_removes):
      raise InputError(
        'order',
        'sequential',
        f'{config.steps()} steps are not enough for {max(num_removes)} layers, one after another; give more '
        '(--train_steps, --num_sequences) or use --order=joint.',
      )


def _check_nothing_removed(config: Config, num_removes: list[int]):
  trains = [r for r in config.recipes() if config.trains(r)]
  if any(not find_recipe(r).heals for r in trains) and not num_removes[0]:
    raise InputError(
      'recipe',
      config.removal.recipe,
      'no layer is removed, so that the whole model would be trained; use elder_jax heal for that, --recipe=none '
      '--compare= to copy it, or remove layers (--num_remove, --ratio or --remove_layers).',
    )
  if trains and (name := config.training.taught_by) and not config.paths.teacher and not all(num_removes):
    raise InputError(
      name,
      getattr(config.training, name),
      'where no layer is removed it distils a model from itself; name the dense model by --teacher, or leave out 0.',
    )


def _open_teacher(config: Config, source: Source) -> tuple[Source | None, list[int] | None]:
  """(--teacher, its layers that the model has), as far as they are given and known."""
  name = config.paths.teacher
  if not name:
    return None, None
  here, there = user_path(name), user_path(config.paths.model)
  if name == config.paths.model or (here.exists() and there.exists() and os.path.samefile(here, there)):
    raise InputError('teacher', name, 'is --model itself; give the dense model that it was made from.')
  scratch = config.path() / 'source' / 'teacher'
  try:
    teacher = hosts.leader_first(lambda: open_source(name, scratch))
  except InputError as e:
    raise InputError('teacher', name, e.why) from e
  if teacher.spec.vocab_size != source.spec.vocab_size:
    raise InputError(
      'teacher',
      name,
      f'has a vocabulary of {teacher.spec.vocab_size}, the model one of {source.spec.vocab_size}; give the model that it '
      'was made from.',
    )
  check_streams(config, source, teacher)
  return teacher, kept_layers(config, source, teacher)


def check_sizes(config: Config, spec: Spec, num_layers: int, mesh: jax.sharding.Mesh) -> Decoder:
  """The model of shardings (sharding.for_model). Raises InputError for what the devices do not divide."""
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
  """What a run reads besides the model; `read` has the sha256 of each."""

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
      raise InputError('train_data', '', 'is missing; give a text to choose layers by and to train on.')
    self._load_tokenizer()
    self._check_length('seq_len', settings.seq_len)
    shared = self._shared_cache()

    def read():
      of_model = self._bos_first, self.source.spec.vocab_size
      return training_text.open_text(settings, self.tokenizer, *of_model, self.config.validates(), shared)

    text = hosts.leader_first(read)  # process 0 makes the tokens that the others read
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
    """The folder of tokens of a run of several processes, which all must see."""
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
    """Of those that come with elder_jax a model need not be able to answer any."""
    settings, source = self.config.evaluation, self.source
    if not settings.asks_prompts:
      return
    if self.tokenizer is None:
      log('no answers to --prompts: this run reads no text, and so loads no model')
      return
    texts = answers.read_prompts(settings.prompts)
    rows = answers.encode(texts, self.tokenizer, self._bos()[1])
    if why := answers.why_not(rows, settings.answer_tokens, source.spec.vocab_size, source.context_length):
      if settings.prompts:
        raise InputError('prompts', settings.prompts, f'{why}; give others, or fewer --answer_tokens.')
      log(f'no answers to prompts: {why}')
      return
    self.prompts = dict(zip(texts, rows))
    if settings.prompts:
      self.read[inputs.named('prompts', settings.prompts)] = identity.of_files([user_path(settings.prompts)])

  def _bos(self) -> tuple[str, int | None]:
    return data.bos_rule(self.config.data.bos, self._bos_first, self.tokenizer)

  def _check_length(self, setting: str, length: int):
    """Learned positions end somewhere, and so do tables that depend on the length of a text."""
    if 0 < self.source.spec.most_positions < length:
      raise InputError(
        setting, length, f'this model has {self.source.spec.most_positions} positions; give at most that many.'
      )

  def _check_tokens(self, rows_NT: np.ndarray, setting: str, text: str):
    if (largest := int(rows_NT.max())) >= (known := self.source.spec.vocab_size):
      raise InputError(
        setting, text, f'the tokenizer made token {largest}, the model has {known}; give its own by --tokenizer.'
      )
