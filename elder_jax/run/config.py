"""All settings of a run: one frozen dataclass, each field of which is a flag with one line of help.

Nothing else reads flags. `config.json` in the work folder holds the same fields, and reproduces the run.
"""

import dataclasses
import decimal
import math
import pathlib

from absl import flags

from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.methods import importance

HOW_MUCH = ('ratio', 'num_remove', 'remove_layers')  # of which a run has one
METHODS = ('auto', 'elder', *importance.METHODS, 'laco')
TRAINED = ('regularize', 'prune_then_train', 'absorb_then_train', 'replace_linear_then_train')
RECIPES = (*TRAINED, 'absorb', 'replace_linear', 'none')


def _flag(default, help_text, choices=None):
  return dataclasses.field(default=default, metadata={'help': help_text, 'choices': choices})


@dataclasses.dataclass(frozen=True)
class Config:
  # What goes in and out.
  model: str = _flag('', 'Model to prune: a Hugging Face folder, a hub id (owner/name) or a .gguf file.')
  tokenizer: str = _flag('', "Folder or hub id of the tokenizer, where it is not the model's own.")
  workdir: str = _flag('', 'Folder for results; made if missing. A run started again in it goes on where it was.')
  # How much goes, and what.
  ratio: str | None = _flag(
    None,
    'Fraction of the layers to remove, rounded half up to a whole number of layers. Several, as in 0.25,0.1,0.4: a '
    'table and a plot of all; the first is exported. Unset: 0.25. Of --ratio, --num_remove and --remove_layers the one '
    'given last counts.',
  )
  num_remove: int | None = _flag(None, 'Number of layers to remove, in place of --ratio.')
  remove_layers: str | None = _flag(
    None,
    'Layers to remove by 0-based number, e.g. 3,5, in place of --ratio and --method. Empty (--remove_layers=): none.',
  )
  method: str = _flag(
    'auto',
    f'How layers are chosen, of {", ".join(METHODS)}. auto: what cosine_block, taylor or ppl choose, whichever leaves the '
    'least loss when it is absorbed; elder: learned gates; laco merges layers instead of removing them. Several, as in '
    'auto,sleb: one table of all; the first is exported.',
  )
  score_steps: int = _flag(
    8, 'Batches of the training text that methods other than elder score the layers on; auto judges by as many more.'
  )
  recipe: str = _flag(
    'absorb_then_train',
    'What happens to the chosen layers: regularize, then remove (ELDeR); prune_then_train, removed first and then '
    'the same steps of LM training; absorb, removed while the layers before them are refitted, in closed form, to do '
    "their work; replace_linear, ReplaceMe's rule for the same; either with _then_train, followed by the same steps of "
    'LM training; none, just removed.',
    RECIPES,
  )
  compare: list[str] = _flag(
    ('none',), 'Further recipes, run on the same layers and batches for the report only; empty (--compare=): no others.'
  )
  # Data.
  train_data: str = _flag(
    '',
    'Text to train on: a .txt, .jsonl or .parquet file, a folder of files of one of these kinds, or a hub id with '
    'configuration and split, id:config:split.',
  )
  eval_data: tuple[str, ...] = _flag(
    (),
    'Text to measure perplexity on, name=source; repeatable. An empty one (--eval_data=) drops those given before it.',
  )
  text_column: str = _flag('text', 'Column of jsonl, parquet and hub data that holds the text.')
  bos: str = _flag(
    'auto',
    "Begin-of-sequence token, in all texts: tokenizer, where the tokenizer's own rule puts one, at the start of the text "
    '(the usual protocol); window, first in every training sequence and evaluation window; none; auto: window for Gemma, '
    'which is lost without one, tokenizer for other families.',
    ('auto', 'tokenizer', 'window', 'none'),
  )
  seq_len: int = _flag(2048, 'Tokens per training sequence.')
  num_sequences: int = _flag(128, 'Training sequences; the text must be long enough for them.')
  batch_size: int = _flag(4, 'Sequences per step; must divide --num_sequences.')
  grad_accum: int = _flag(1, 'Parts that a batch is worked off in, to save memory; must divide --batch_size.')
  shuffle: bool = _flag(True, 'Draw the sequences from the whole text and shuffle them in each pass; else text order.')
  seed: int = _flag(
    0, "Seed of the choice and order of the sequences and of LoRA's first factors; nothing else in a run is random."
  )
  # Evaluation.
  eval_seq_len: int = _flag(2048, 'Window of the perplexity, in tokens; windows do not overlap, the rest is dropped.')
  eval_tokens: int = _flag(0, 'Tokens of each evaluation text that are used, from its start; 0: all.')
  eval_batch_size: int = _flag(4, 'Windows per evaluation step.')
  # Stage 1: which layers go.
  gate: str = _flag(
    'residual', 'Where a gate sits: residual, x + g*d; output, g*(x + d), the paper.', ('residual', 'output')
  )
  selection: str = _flag(
    'one_shot',
    'iterative: one layer per round, the rest learned on without it; one_shot: all after one round.',
    ('iterative', 'one_shot'),
  )
  lambda1: float = _flag(5e-3, 'Weight of the L1 penalty on the gates.')
  gate_lr: float = _flag(0.005, 'Learning rate of the gates (Adam).')
  gate_steps: int = _flag(
    28, 'Steps per round of stage 1; one_shot has one round, iterative one for each layer that goes.'
  )
  protect_first: int = _flag(3, 'Layers at the input end that elder never chooses.')
  protect_last: int = _flag(4, 'Layers at the output end that elder never chooses.')
  # Stage 2: what is trained, and how.
  penalty: str = _flag('l2', "Norm of a layer's update in the penalty.", ('l2', 'l1'))
  penalty_scale: str = _flag(
    'token',
    "token: mean over tokens of each token's norm; relative: the same, divided by the norm of the layer's input; "
    'none: norm over the whole batch.',
    ('token', 'relative', 'none'),
  )
  lambda2: float = _flag(1e-3, 'Weight of the penalty on the updates of the layers that will be removed.')
  lambda2_power: float = _flag(
    0.0, 'Ramp of lambda2: it is lambda2 * f^power at the fraction f of the steps; 0: constant, 1: linear, 2: square.'
  )
  order: str = _flag(
    'sequential',
    'joint: all chosen layers are penalised together; sequential: one after another, each switched off after its turn.',
    ('joint', 'sequential'),
  )
  anneal: float = _flag(
    0.0,
    'Fraction of the steps of regularize in which the gates of the chosen layers go from 1 to 0; 0: they stay at 1.',
  )
  distill: float = _flag(
    0.0, "Weight of the KL divergence from the dense model's predictions, in all training; 1 minus it is the LM loss's."
  )
  train_steps: int | None = _flag(
    None, 'Steps of stage 2, and of the training of other recipes; unset: one pass over the sequences.'
  )
  lr: float = _flag(
    3e-4, 'Peak learning rate of stage 2; falls linearly to 0. LoRA wants a higher one, lion one 3 to 10 times lower.'
  )
  warmup_ratio: float = _flag(0.05, 'Fraction of the steps over which the learning rate rises from 0.')
  weight_decay: float = _flag(0.0, 'Weight decay of matrices in stage 2.')
  grad_clip: float = _flag(1.0, 'Norm that gradients are clipped to.')
  trainable: str = _flag(
    'blocks', "blocks: the layers' weights; all: embedding, final norm and head as well.", ('blocks', 'all')
  )
  optimizer: str = _flag(
    'adamw',
    'Optimiser of the training; stage 1 always has Adam. Its float32 state per trained weight: adamw 8 bytes; lion 4; '
    'adafactor (factored, no momentum) next to none for matrices with two axes of 128 or more.',
    ('adamw', 'adafactor', 'lion'),
  )
  moment_dtype: str = _flag(
    'float32',
    "Type of the first moment of --optimizer=adamw and of lion's only one, 2 bytes per trained weight less in bfloat16; "
    'second moments stay float32. Stage 1 stays float32.',
    ('float32', 'bfloat16'),
  )
  lora_rank: int = _flag(
    0,
    "Rank of LoRA in all training but stage 1: only a low-rank change of each of the layers' matrices is trained, the "
    'matrices themselves, norms, biases and embeddings are frozen; merged before pruning and export. 0: no LoRA.',
  )
  lora_alpha: float | None = _flag(
    None, "LoRA's change is alpha / rank times the product of its factors; unset: twice --lora_rank."
  )
  # Zero-shot tasks.
  tasks: str = _flag('', 'Tasks of lm-evaluation-harness, as in piqa,arc_easy, to evaluate all models of the run on.')
  tasks_dir: str = _flag('', "Folder of local task files (.yaml), which go before the harness's own of a name.")
  task_limit: int = _flag(0, 'Questions per task, from the start; 0: all.')
  # Computation.
  dtype: str = _flag(
    'float32', 'Type of computation and of frozen weights; what is trained is kept in float32.', ('float32', 'bfloat16')
  )
  remat: str = _flag(
    'dots',
    'What the backward pass computes again, to save memory: none; dots, all but matrix products; dots_no_batch, '
    "attention's products as well, which grow with the square of --seq_len; full.",
    ('none', 'dots', 'dots_no_batch', 'full'),
  )
  mesh: str = _flag('-1,1,1', 'Devices for data, fsdp and tensor parallelism, e.g. 1,8,1; -1: all that remain.')
  plan: bool = _flag(
    False,
    'Only tell what the run would take of each device and how long its steps would take at least, by asking the compiler; '
    'a config.json is enough of a model. Exit status 3 where it does not fit.',
  )
  force: bool = _flag(
    False, 'Start a run that does not fit by its plan; else it ends with exit status 3 before loading.'
  )
  topology: str = _flag('', 'With --plan: TPUs to compile for that need not be there, as in v5e:4x4 (pip: libtpu).')
  checkpoint_every: int = _flag(100, 'Steps between checkpoints in a stage; 0: at the borders of stages only.')
  checkpoint_minutes: float = _flag(0.0, 'Minutes after which a checkpoint is written in any case; 0: never by time.')
  keep_checkpoints: int = _flag(
    2, 'Checkpoints of a stage that stay; where the newest is damaged the one before is used.'
  )
  # Output.
  export_dtype: str = _flag(
    '', "Type of the exported weights; unset: the model's own.", ('', 'float32', 'bfloat16', 'float16')
  )
  shard_gb: float = _flag(5.0, 'Largest size of an exported file, in GB (1e9 bytes).')
  verify: str = _flag(
    'auto',
    'Checks of the exported folder: auto, read back in JAX, and in PyTorch where torch and transformers are '
    'installed; jax: JAX only; torch: both, an error if they are missing.',
    ('auto', 'jax', 'torch'),
  )

  def check(self):
    """Raises InputError for settings that no run can have. What depends on the model is checked in the pipeline."""
    for field in dataclasses.fields(self):
      value, choices = getattr(self, field.name), field.metadata['choices']
      if choices and value not in choices:
        known = ', '.join(choice or "''" for choice in choices)
        raise InputError(f'--{field.name}={value}: is not known, these are: {known}.')
    given = [f'--{name}={getattr(self, name)}' for name in HOW_MUCH if getattr(self, name) is not None]
    if len(given) > 1:
      raise InputError(f'{" and ".join(given)}: how much is removed can be said in one way only; leave out the others.')
    if self.topology and not self.plan:
      raise InputError(f'--topology={self.topology}: is only compiled for; add --plan.')
    if not self.workdir and not self.plan:
      raise InputError('--workdir is missing: give a folder for the results.')
    for name in (
      'seq_len',
      'num_sequences',
      'batch_size',
      'grad_accum',
      'eval_seq_len',
      'eval_batch_size',
      'gate_steps',
      'score_steps',
      'keep_checkpoints',
    ):
      least = 2 if name.endswith('seq_len') else 1
      if getattr(self, name) < least:
        raise InputError(f'--{name}={getattr(self, name)} is too small; give at least {least}.')
    for name in (
      'lambda1',
      'lambda2',
      'lambda2_power',
      'gate_lr',
      'lr',
      'weight_decay',
      'protect_first',
      'protect_last',
      'eval_tokens',
      'seed',
      'task_limit',
      'checkpoint_every',
      'checkpoint_minutes',
      'train_steps',
      'num_remove',
      'lora_rank',
    ):
      value = getattr(self, name)
      if value is not None and not 0 <= value < math.inf:
        raise InputError(f'--{name}={value} is negative or not finite; give 0 or more.')
    for name in ('grad_clip', 'shard_gb'):
      if not 0 < getattr(self, name) < math.inf:
        raise InputError(f'--{name}={getattr(self, name)} must be above 0 and finite.')
    if not 0 <= self.warmup_ratio < 1:
      raise InputError(f'--warmup_ratio={self.warmup_ratio} must be at least 0 and below 1.')
    for name in ('anneal', 'distill'):
      if not 0 <= getattr(self, name) <= 1:
        raise InputError(f'--{name}={getattr(self, name)} must be in 0 … 1.')
    if self.num_sequences % self.batch_size:
      raise InputError(
        f'--batch_size={self.batch_size} does not divide --num_sequences={self.num_sequences}; change one of them.'
      )
    if self.batch_size % self.grad_accum:
      raise InputError(
        f'--grad_accum={self.grad_accum} does not divide --batch_size={self.batch_size}; change one of them.'
      )
    if self.optimizer == 'adafactor' and self.moment_dtype != 'float32':
      raise InputError(
        f'--moment_dtype={self.moment_dtype}: --optimizer=adafactor has no first moment; leave the type away, or use '
        'adamw or lion.'
      )
    if self.lora_rank and self.trainable == 'all':
      raise InputError(
        f"--lora_rank={self.lora_rank}: LoRA trains nothing but a change of the layers' matrices; use --trainable=blocks."
      )
    if self.lora_alpha is not None and not (self.lora_rank and 0 < self.lora_alpha < math.inf):
      raise InputError(
        f'--lora_alpha={self.lora_alpha}: must be above 0 and finite, and needs --lora_rank; give both, or neither.'
      )
    if unknown := next((r for r in self.compare if r not in RECIPES), None):
      raise InputError(f'--compare: {unknown!r} is no recipe, these are: {", ".join(RECIPES)}.')
    self.corpora()
    self.layers_given()
    self.methods()
    self.ratios()

  def corpora(self) -> dict[str, str]:
    """The evaluation texts: {name: source}."""
    corpora: dict[str, str] = {}
    for entry in self.eval_data:
      if not entry:
        corpora.clear()
        continue
      name, found, source = entry.partition('=')
      if not (name and found and source) or '/' in name:
        raise InputError(f'--eval_data={entry}: must be name=source, as in --eval_data=news=news.txt.')
      corpora[name] = source
    return corpora

  def layers_given(self) -> list[int] | None:
    """--remove_layers as sorted numbers; None where stage 1 shall choose."""
    if self.remove_layers is None:
      return None
    try:
      layers = [int(part) for part in self.remove_layers.split(',') if part.strip()]
    except ValueError as e:
      raise InputError(f'--remove_layers={self.remove_layers}: must be numbers with commas, as in 3,5.') from e
    if len(set(layers)) < len(layers):
      raise InputError(f'--remove_layers={self.remove_layers}: names a layer twice; name each once.')
    return sorted(layers)

  def methods(self) -> list[str]:
    """The ways of choosing to run; the first is that of the exported model."""
    methods = list(dict.fromkeys(m.strip() for m in self.method.split(',')))
    if unknown := next((m for m in methods if m not in METHODS), None):
      raise InputError(f'--method={self.method}: {unknown!r} is no method, these are: {", ".join(METHODS)}.')
    return methods

  def ratios(self) -> list[decimal.Decimal]:
    """The fractions of layers to remove; the first is that of the exported model."""
    try:
      ratios = [decimal.Decimal(part.strip()) for part in self._ratio().split(',')]
    except decimal.InvalidOperation as e:
      raise InputError(f'--ratio={self.ratio}: must be numbers with commas, as in 0.1,0.25.') from e
    if not all(ratio.is_finite() and 0 <= ratio < 1 for ratio in ratios):
      raise InputError(f'--ratio={self.ratio} must be at least 0 and below 1.')
    return ratios

  def _ratio(self) -> str:
    return '0.25' if self.ratio is None else str(self.ratio)

  def task_names(self) -> list[str]:
    return [task.strip() for task in self.tasks.split(',') if task.strip()]

  def recipes(self) -> list[str]:
    """The recipes to run; the one that is exported last."""
    return [r for r in dict.fromkeys(self.compare) if r != self.recipe] + [self.recipe]

  def steps(self) -> int:
    return self.num_sequences // self.batch_size if self.train_steps is None else self.train_steps

  def path(self) -> pathlib.Path:
    return user_path(self.workdir)


@dataclasses.dataclass(frozen=True)
class Launch:
  """What differs between the processes of a run, and so is not of its config.json."""

  distributed: str = _flag(
    'auto',
    'Several processes as one run: auto, where flags or the environment (Cloud TPU, GKE, Slurm, Open MPI) name them; on, '
    'the same, an error where they do not; off, this process alone.',
    ('auto', 'on', 'off'),
  )
  coordinator: str = _flag('', "Process 0's host:port, where the environment does not tell; the same in all processes.")
  num_processes: int | None = _flag(None, 'Number of processes; with --coordinator.')
  process_id: int | None = _flag(None, 'Number of this process, from 0; with --coordinator.')

  def check(self):
    given = [bool(self.coordinator), self.num_processes is not None, self.process_id is not None]
    if any(given) and not all(given):
      raise InputError('--coordinator, --num_processes and --process_id: give all three or none.')
    if not any(given):
      return
    if self.distributed == 'off':
      raise InputError('--distributed=off and --coordinator exclude each other; leave out one.')
    host, _, port = self.coordinator.rpartition(':')
    if not (host and port.isdecimal()):
      raise InputError(f'--coordinator={self.coordinator}: must be host:port, as in 10.0.0.2:1234.')
    if not 0 <= self.process_id < self.num_processes:
      raise InputError(
        f'--process_id={self.process_id} is not in 0 … {self.num_processes - 1}, the range of --num_processes.'
      )


class _LastCounts(flags.Flag):
  """One of HOW_MUCH: the last one on the command line, flag files included, takes the place of the others."""

  def __init__(self, flag_values: flags.FlagValues, parser: flags.ArgumentParser, name: str, help_text: str):
    super().__init__(parser, flags.ArgumentSerializer(), name, None, help_text)
    self._flag_values, self.replaced = flag_values, []

  def parse(self, argument):
    for other in (self._flag_values[name] for name in HOW_MUCH if name != self.name):
      if other.present:
        self.replaced.append(f'--{other.name}={other.value}')
        other.unparse()
    super().parse(argument)


def replaced(flag_values: flags.FlagValues = flags.FLAGS) -> str:
  """A sentence on the ways of saying how much that a later one replaced; empty where there was none."""
  flag = next((flag_values[name] for name in HOW_MUCH if flag_values[name].present), None)
  if flag is None or not flag.replaced:
    return ''
  return f'{" and ".join(flag.replaced)}: not used, since --{flag.name}={flag.value} was given later'


def define_flags(flag_values: flags.FlagValues = flags.FLAGS):
  """Defines one absl flag for each field of Config and Launch."""
  for field in (*dataclasses.fields(Config), *dataclasses.fields(Launch)):
    name, default, help_text = field.name, field.default, field.metadata['help']
    kwargs = {'flag_values': flag_values, 'module_name': 'elder_jax'}
    if name in HOW_MUCH:
      parser = flags.IntegerParser() if field.type == int | None else flags.ArgumentParser()
      flags.DEFINE_flag(_LastCounts(flag_values, parser, name, help_text), **kwargs)
    elif field.metadata['choices']:
      flags.DEFINE_enum(name, default, list(field.metadata['choices']), help_text, **kwargs)
    elif field.name == 'eval_data':
      flags.DEFINE_multi_string(name, list(default), help_text, **kwargs)
    elif field.name == 'compare':
      flags.DEFINE_list(name, list(default), help_text, **kwargs)
    else:
      define = {bool: flags.DEFINE_boolean, str: flags.DEFINE_string, str | None: flags.DEFINE_string}
      define |= {int: flags.DEFINE_integer, int | None: flags.DEFINE_integer, float: flags.DEFINE_float}
      define |= {float | None: flags.DEFINE_float}
      define[field.type](name, default, help_text, **kwargs)


def launch_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Launch:
  return Launch(**{field.name: flag_values[field.name].value for field in dataclasses.fields(Launch)})


def from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> Config:
  values = {field.name: flag_values[field.name].value for field in dataclasses.fields(Config)}
  values['eval_data'] = tuple(values['eval_data'])
  values['compare'] = [r for r in values['compare'] if r]
  return Config(**values)
