"""All settings of a run, in groups. Every field is a flag with a help text and has the same name in config.json."""

from collections.abc import Callable
import dataclasses
import decimal
import functools
import json
import pathlib
from typing import Any

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.methods.elder import GateSettings
from elder_jax.methods.mask import MaskSettings
from elder_jax.methods.swaps import SwapSettings
from elder_jax.model.spec import Mode
from elder_jax.recipes import find_recipe
from elder_jax.run.removal_settings import DEFAULT_RATIO
from elder_jax.run.removal_settings import RemovalSettings
from elder_jax.run.result_settings import EvalSettings
from elder_jax.run.result_settings import OutputSettings
from elder_jax.settings import Settings
from elder_jax.settings import default_of
from elder_jax.settings import fields
from elder_jax.settings import name_of
from elder_jax.settings import setting
from elder_jax.text import zero_shot
from elder_jax.text.settings import DataSettings
from elder_jax.training.settings import TrainSettings

# Maximum number of tokens to fit a closed form on: 35 for each of the 30,000 features of the largest models' layers.
FITTED = 2**20


@dataclasses.dataclass(frozen=True)
class PathSettings(Settings):
  """Inputs, and where results go."""

  model: str = setting('', 'Model to prune: a Hugging Face folder, a hub id (owner/name) or a .gguf file.')
  tokenizer: str = setting('', "Folder or hub id of the tokenizer. Unset: the model's own.")
  teacher: str = setting(
    '', 'Model to distil from with --distill or --distill_hidden. Unset: --model before the removal.'
  )
  kept_layers: tuple[int, ...] | None = setting(
    None,
    'Layers of --teacher that --model still has, 0-based, as in 0-11,19-29; for --distill_hidden. Unset: read from the '
    'model folder, if elder_jax or mergekit wrote it.',
    least=0,
  )
  workdir: str = setting('', 'Folder for results, created if missing. A run that is started again in it resumes.')


@dataclasses.dataclass(frozen=True)
class ComputeSettings(Settings):
  """Devices, memory and checkpoints."""

  dtype: str = setting(
    'float32',
    'Type of computation and of frozen weights; trained weights are kept in float32. auto: bfloat16 where the devices have '
    'instructions for it, else float32.',
    choices=('float32', 'bfloat16', 'auto'),
  )
  remat: str = setting(
    'dots',
    'What the backward pass recomputes to save memory: none; dots, everything but matrix products; dots_no_batch, also '
    'the products of attention, which grow with the square of --seq_len; full, whole layers.',
    choices=('none', 'dots', 'dots_no_batch', 'full'),
  )
  mesh: tuple[int, ...] = setting(
    (-1, 1, 1), 'Devices for data, fsdp and tensor parallelism, as in 1,8,1; -1: all remaining devices.'
  )
  plan: bool = setting(
    False,
    'Only print the memory and the least time of each stage, as reported by the compiler. Of the model, config.json is '
    'enough. Exit status 3 if the run does not fit.',
  )
  force: bool = setting(
    False, 'Start a run even if its plan does not fit. Without it, such a run exits with status 3 before loading.'
  )
  topology: str = setting(
    '',
    'With --plan: TPU slice to compile for, as in v5e:4x4. The TPUs need not be available; libtpu must be installed.',
  )
  checkpoint_every: int = setting(
    100, 'Steps between checkpoints within a stage; 0: only at the end of a stage.', least=0
  )
  checkpoint_minutes: float = setting(
    0.0,
    'Maximum number of minutes between checkpoints; 0: no limit.',
    least=0,
    rare=True,
  )
  keep_checkpoints: int = setting(
    2,
    'Checkpoints of a stage to keep. If the newest is damaged, the one before it is used.',
    least=1,
    rare=True,
  )

  def __post_init__(self):
    super().__post_init__()
    if self.topology and not self.plan:
      raise InputError('topology', self.topology, 'can only be planned for; add --plan.')


@dataclasses.dataclass(frozen=True)
class Config:
  """All settings of a run. `Config.of` creates one from settings by name, whatever their group."""

  paths: PathSettings = PathSettings()
  removal: RemovalSettings = RemovalSettings()
  data: DataSettings = DataSettings()
  evaluation: EvalSettings = EvalSettings()
  gates: GateSettings = GateSettings()
  mask: MaskSettings = MaskSettings()
  swaps: SwapSettings = SwapSettings()
  training: TrainSettings = TrainSettings()
  computation: ComputeSettings = ComputeSettings()
  output: OutputSettings = OutputSettings()

  def __post_init__(self):
    """Raises InputError for settings that exclude each other. prepare.py checks what depends on the model."""
    data = self.data
    if data.train_tokens is not None and self.training.steps is not None:
      raise InputError(
        'train_tokens', data.train_tokens, 'and --train_steps both set the length of the training; leave out one.'
      )
    by = self.removal.judge_by
    if by != 'loss' and ':' not in by and by not in zero_shot.expand(self.evaluation.tasks):
      raise InputError(
        'judge_by',
        by,
        'is not one of --tasks; add it there, or use loss or package.module:NAME.',
      )
    if data.batch_size % self.training.grad_accum:
      raise InputError(
        'grad_accum', self.training.grad_accum, f'does not divide --batch_size={data.batch_size}; change one of them.'
      )

  @classmethod
  def of(cls, **settings) -> 'Config':
    """Creates one from settings by their external names (settings.name_of). Raises InputError for an unknown name."""
    groups: dict[str, dict] = {}
    for name, value in settings.items():
      if name not in PLACES:
        raise InputError(name, value, 'there is no such setting; check the name.')
      group, field = PLACES[name]
      groups.setdefault(group, {})[field] = value
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return cls(**{group: kinds[group](**values) for group, values in groups.items()})

  @classmethod
  def of_json(cls, text: str) -> 'Config':
    """Creates one from the text of a run's config.json, which an earlier version may have written."""
    return cls.of(**settings_of_json(json.loads(text)))

  def flat(self) -> dict[str, Any]:
    """{external name: value} of all settings."""
    return {name: getattr(getattr(self, group), field) for name, (group, field) in PLACES.items()}

  def to_json(self) -> dict[str, Any]:
    """`flat` with JSON types."""
    return json.loads(json.dumps(self.flat()))

  def replace(self, **settings) -> 'Config':
    return Config.of(**(self.flat() | settings))

  def with_dtype(self, fast: Callable[[], str]) -> 'Config':
    """Replaces --dtype=auto by fast()."""
    return self.replace(dtype=fast()) if self.computation.dtype == 'auto' else self

  # ---- derived from several settings ----

  def recipes(self) -> list[str]:
    """The recipes to run; the last one is exported."""
    return [r for r in dict.fromkeys(self.removal.compare) if r != self.removal.recipe] + [self.removal.recipe]

  def methods(self) -> list[str]:
    """The methods to run; the first one is for the exported model. Empty if the layers are given."""
    return [] if self.removal.remove_layers is not None else list(dict.fromkeys(self.removal.method))

  def trains(self, recipe: str) -> bool:
    return find_recipe(recipe).trains and self.steps() > 0

  @property
  def one_pass(self) -> int:
    """Number of batches in one pass over the training sequences."""
    return self.data.sequences // self.data.batch_size

  @property
  def fitted_steps(self) -> int:
    """Number of batches that closed forms read: the first pass of the training, up to FITTED tokens."""
    most = -(-FITTED // (self.data.batch_size * self.data.seq_len))
    return min(self.steps() or self.one_pass, self.one_pass, most)

  def steps(self) -> int:
    """Number of training steps."""
    return self.one_pass if self.training.steps is None else self.training.steps

  def train_settings(self, recipe: str = '') -> TrainSettings:
    """The settings of a recipe's training, completed from other settings. Unset: the exported recipe."""
    only = find_recipe(recipe or self.removal.recipe).only
    return dataclasses.replace(self.training, steps=self.steps(), seed=self.data.seed, only=only)

  def validates(self) -> bool:
    """Whether sequences are held out of the training text to measure all models on."""
    return self.training.validate_every > 0

  def mode(self) -> Mode:
    training, computation = self.training, self.computation
    return Mode(self.gates.gate, training.penalty, training.penalty_scale, computation.dtype, computation.remat)

  def path(self) -> pathlib.Path:
    """The work folder."""
    return user_path(self.paths.workdir)

  def counts(self, num_layers: int) -> list[int]:
    """Numbers of layers to remove, rounded half up; the first is for the exported model. prepare.py checks bounds."""
    removal = self.removal
    if removal.remove_layers is not None:
      return [len(removal.remove_layers)]
    if removal.num_remove is not None:
      return [removal.num_remove]
    exact = [decimal.Decimal(str(ratio)) * num_layers for ratio in removal.ratio or DEFAULT_RATIO]
    return list(dict.fromkeys(int(n.to_integral_value(decimal.ROUND_HALF_UP)) for n in exact))


def groups() -> dict[str, type[Settings]]:
  """{group of Config: its class}."""
  return {field.name: field.type for field in dataclasses.fields(Config)}


def all_fields() -> dict[str, dataclasses.Field]:
  """{external name: field} of all settings."""
  return {name_of(field): field for group in groups().values() for field in fields(group)}


# External name of a setting -> (group, field).
PLACES = {name_of(field): (group, field.name) for group, kind in groups().items() for field in fields(kind)}


@functools.cache
def defaults() -> dict[str, Any]:
  return {name: default_of(field) for name, field in all_fields().items()}


def settings_of_json(value: dict[str, Any]) -> dict[str, Any]:
  """Returns the arguments of `Config.of` from a config.json that this or an earlier version wrote.

  Earlier versions wrote lists as text with commas, evaluation texts as name=source, and a single weight of distillation.
  """
  settings = {name: v for name, v in value.items() if name != 'push_to_hub'}  # each upload is asked for
  for name in ('method', 'tasks'):
    if isinstance(settings.get(name), str):
      settings[name] = tuple(part.strip() for part in settings[name].split(',') if part.strip())
  for name, kind in (('ratio', float), ('remove_layers', int), ('mesh', int)):
    if isinstance(settings.get(name), str):
      settings[name] = tuple(kind(part) for part in settings[name].split(',') if part.strip())
  if isinstance(text := settings.get('train_data'), str):  # a single source, which may contain commas
    settings['train_data'] = (text,) if text else ()
  if isinstance(settings.get('distill'), int | float):
    settings['distill'] = (settings['distill'],)
  if isinstance(settings.get('eval_data'), list | tuple):
    pairs = [entry.partition('=') for entry in settings['eval_data'] if entry]
    settings['eval_data'] = {pair[0]: pair[2] for pair in pairs}
  return {name: v for name, v in settings.items() if name in PLACES}
