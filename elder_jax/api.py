"""elder_jax as a library.

    import elder_jax as ej
    dense = ej.load('HuggingFaceTB/SmolLM2-135M')
    data = ej.batches(dense, 'wiki.txt', seq_len=512, num_sequences=128)
    layers = ej.choose(dense, 7, data).removed
    small = ej.absorb(dense, layers, data)
    small = ej.train(small, data, ej.TrainSettings(steps=100), teacher=dense)
    print(ej.perplexity(small, 'test.txt'))
    ej.export(small, 'out')

Models are values: each function gives a new one and leaves its arguments as they are. Bad input is an InputError with the
attributes setting, value and why.
"""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax

from elder_jax import methods
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf import manifest
from elder_jax.hf import verify
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.hf.table import abstract_decoder
from elder_jax.log import QUIET
from elder_jax.log import Log
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes import absorb as absorb_recipe
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context
from elder_jax.run import series
from elder_jax.run.config import Config
from elder_jax.text import data
from elder_jax.text import training_text
from elder_jax.text.settings import DataSettings
from elder_jax.training import trainer
from elder_jax.training.batches import Batches
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.settings import TrainSettings
from elder_jax.training.validation import Validation


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder on its devices, and the checkpoint that it came from.

  kept: its layers, 0-based numbers of that checkpoint.
  """

  decoder: Decoder
  source: Source
  kept: tuple[int, ...]
  mode: Mode
  mesh: jax.sharding.Mesh
  _scratch: Any = dataclasses.field(default=None, repr=False)  # a folder that lives as long as the model

  @property
  def num_layers(self) -> int:
    return self.decoder.num_layers

  @property
  def num_params(self) -> int:
    return pruning.num_params(self.decoder)

  @functools.cached_property
  def tokenizer(self):
    """Of transformers."""
    return data.load_tokenizer(str(self.source.files))

  def _with(self, decoder: Decoder, removed: Sequence[int] = ()) -> 'Model':
    kept = tuple(l for i, l in enumerate(self.kept) if i not in set(removed))
    return dataclasses.replace(self, decoder=decoder, kept=kept)


def load(name: str, *, dtype: str = 'float32', mesh: Sequence[int] = (-1, 1, 1), remat: str = 'dots') -> Model:
  """A model of a Hugging Face folder, a hub id or a .gguf file.

  Args:
    dtype: of computation and of weights, float32 or bfloat16; what is trained becomes float32.
    mesh: devices for data, fsdp and tensor parallelism; one may be -1, all that remain.
    remat: what the backward pass computes again: none, dots, dots_no_batch or full.

  Raises:
    InputError: the model cannot be read, or a setting is not valid.
  """
  Config.of(dtype=dtype, remat=remat)  # checks them
  scratch = tempfile.TemporaryDirectory()
  source = open_source(name, pathlib.Path(scratch.name))
  devices = sharding.make_mesh(mesh)
  shardings = sharding.for_model(abstract_decoder(source.spec, source.num_layers), devices, mesh)
  decoder = load_model(source, dtype, shardings)
  kept = tuple(range(source.num_layers))
  return Model(decoder, source, kept, Mode(dtype=dtype, remat=remat), devices, scratch)


def batches(
  model: Model,
  text: str | Sequence[str],
  *,
  seq_len: int = 512,
  num_sequences: int = 128,
  batch_size: int = 4,
  seed: int = 0,
  text_column: str = 'text',
  bos: str = 'auto',
  **settings: Any,
) -> Batches:
  """Batches [batch_size, seq_len] of tokens, drawn with `seed` from a text: a file, a folder or a hub id.

  Args:
    text: or several, each as [name=]source[@weight], for a blend.
    settings: others of the training text by name, such as train_tokens, documents, train_on.

  Raises:
    InputError: the text is too short, or cannot be read.
  """
  entries = (text,) if isinstance(text, str) else tuple(text)
  given = dict(seq_len=seq_len, num_sequences=num_sequences, batch_size=batch_size, seed=seed, bos=bos) | settings
  data_settings = DataSettings(train_data=entries, text_column=text_column, **given)
  sharding.check_batch(model.mesh, tuple(model.mesh.shape.values()), batch_size, 'batch_size')
  opened = training_text.open_text(
    data_settings,
    model.tokenizer,
    getattr(model.source.family, 'BOS_FIRST', False),
    model.decoder.spec.vocab_size,
    setting='text',
  )
  return Batches(opened.rows, batch_size, seed if data_settings.shuffle else None, model.mesh)


def choose(
  model: Model, n: int, batches: Batches, method: str = 'auto', *, seed: int = 0, score_steps: int = 8, log: Log = QUIET
) -> Choice:
  """The n layers that a method removes, as numbers of this model.

  Args:
    method: a name of METHODS, or your own as package.module:NAME.
    score_steps: batches that layers are scored on.

  Raises:
    InputError: the method cannot choose so many.
  """
  if not 0 <= n < model.num_layers:
    raise InputError('n', n, f'must be at least 0 and below {model.num_layers}, the layers of the model.')
  with jax.set_mesh(model.mesh):
    return methods.choose(method, _context(model, batches, log, seed=seed, score_steps=score_steps), n)


def remove(model: Model, layers: Sequence[int]) -> Model:
  """The model without these layers. Raises InputError."""
  _check_layers(model, layers)
  with jax.set_mesh(model.mesh):
    return model._with(pruning.prune(model.decoder, list(layers)), layers)


def absorb(model: Model, layers: Sequence[int], batches: Batches, *, log: Log = QUIET) -> Model:
  """`remove`, the layers before the gaps refitted in closed form to do the removed layers' work.

  Raises:
    InputError: the model's blocks cannot be refitted, or as `remove`.
  """
  _check_layers(model, layers)
  if why := absorb_recipe.why_not(model.decoder.spec):
    raise InputError(why)
  with jax.set_mesh(model.mesh):
    made = absorb_recipe.start_absorbed(_context(model, batches, log), Choice(list(layers)))
  return model._with(made, layers)


def train(
  model: Model,
  batches: Batches,
  settings: TrainSettings = TrainSettings(),
  *,
  teacher: Model | None = None,
  penalise: Sequence[int] = (),
  checkpoints: str = '',
  validation: Batches | None = None,
  log: Log = QUIET,
) -> Model:
  """The model after training; what trained is float32 (with LoRA merged in the type of the model).

  Args:
    settings: unset steps are one pass over the batches.
    teacher: a model to distil from; settings.distill is the weight of its loss, 0.5 where neither that nor
      settings.distill_hidden is given.
    penalise: layers whose updates are penalised (ELDeR's stage 2), to be removed afterwards.
    checkpoints: a folder to save to and to resume from.
    validation: batches to measure the loss on every settings.validate_every steps, which `log` gets; never trained on.

  Raises:
    InputError: a setting is not valid, or needs a teacher or validation batches.
    NonFiniteLoss: the loss or its gradient became NaN or infinite.
  """
  _check_layers(model, penalise)
  if teacher is model:
    raise InputError('teacher', teacher.source.name, 'is the model itself; give the dense model.')
  if settings.taught and teacher is None:
    raise InputError(
      settings.taught_by, getattr(settings, settings.taught_by), 'needs a teacher; give the dense model.'
    )
  steps = len(batches) if settings.steps is None else settings.steps
  distill = (0.5,) if teacher and not settings.taught else settings.distill
  settings = dataclasses.replace(settings, steps=steps, distill=distill)
  if settings.validate_every and validation is None:
    raise InputError('validate_every', settings.validate_every, 'needs batches to measure on; give validation.')
  kept = _layers_of_teacher(model, teacher, settings) if settings.distill_hidden else None
  saved = Checkpoints(user_path(checkpoints), 100, steps) if checkpoints else None
  mode = dataclasses.replace(model.mode, penalty=settings.penalty, penalty_scale=settings.penalty_scale)
  tokens = batches.batch_size * batches.seq_len
  progress, record = log.progress('training', tokens=tokens), log.steps('train', tokens)

  def told(step: int, metrics: dict):
    record(step, metrics)
    progress(step + 1, steps, f'loss {metrics["loss"]:.4f}')

  taught = teacher.decoder if teacher else None
  with jax.set_mesh(model.mesh), tempfile.TemporaryDirectory() as scratch:
    folder = user_path(f'{checkpoints or pathlib.Path(scratch) / "train"}.held_out')
    seen = _validation(validation, settings, mode, folder, log) if settings.validate_every else None
    first = model.decoder, list(penalise), settings, mode, batches, told, saved, taught, model.mode.dtype
    made = trainer.train(*first, validation=seen, kept=kept)
  return model._with(made)


def export(model: Model, folder: str, *, dtype: str = '', shard_gb: float = 5.0, text_only: bool = False) -> dict:
  """Writes an ordinary Hugging Face folder, reads it back and compares it with the model before it gets its name.

  Args:
    folder: must not exist.
    dtype: of the tensors; empty: that of the checkpoint that the model came from.
    text_only: of a model for pictures and text, the language model by itself.

  Returns:
    The largest difference of a logit, as verify.check has it.

  Raises:
    InputError: the folder exists, or a setting is not valid.
    ExportMismatch: the folder does not compute what the model computes.
  """
  output = Config.of(export_dtype=dtype, shard_gb=shard_gb).output
  final = user_path(folder)
  if os.path.lexists(final):
    raise InputError('folder', folder, 'is there already; give a new one.')
  temporary = final.with_name(f'{final.name}.partial')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  dtype, source, kept = output.export_dtype or model.source.dtype, model.source, list(model.kept)
  shard_bytes = int(output.shard_gb * 1e9)
  with jax.set_mesh(model.mesh):
    pieces_of = pieces_of_model(model.decoder)
    hashes = save_model(pieces_of, source, kept, temporary, dtype, shard_bytes, text_only=text_only)
    tokens_BT = jax.random.randint(jax.random.key(0), (1, 32), 0, source.spec.vocab_size)
    figures = verify.check(temporary, model.decoder, dtype, tokens_BT, torch=verify.use_torch('auto', model.num_params))
  manifest.write(temporary, hashes)
  os.replace(temporary, final)
  return figures


def run(config: Config) -> dict:
  """A whole run, as `elder_jax prune` does it; the report. Config.of(num_remove=7, …) makes its settings."""
  return series.run(config)


def _context(model: Model, batches: Batches, log: Log, **settings) -> Context:
  rows, batch_size, seq_len = len(batches.rows), batches.batch_size, batches.seq_len
  num_sequences = rows // batch_size * batch_size
  config = Config.of(num_sequences=num_sequences, batch_size=batch_size, seq_len=seq_len, **settings)
  return Context(model.decoder, batches, config, model.mode, log)


def _layers_of_teacher(model: Model, teacher: Model, settings: TrainSettings) -> list[int]:
  """For each layer of the model the teacher's layer that it was. Raises InputError where that is not known."""
  if model.source.name != teacher.source.name or not set(model.kept) <= set(teacher.kept):
    raise InputError(
      'distill_hidden',
      settings.distill_hidden,
      'needs a teacher that has the layers of the model, loaded from the same checkpoint; give that, or leave it out.',
    )
  return [teacher.kept.index(l) for l in model.kept]


def _validation(batches: Batches, settings: TrainSettings, mode: Mode, folder: pathlib.Path, log: Log) -> Validation:
  record = log.steps('train.held_out')

  def told(step: int, loss: float):
    record(step, {'held_out_loss': loss})

  return Validation(batches, settings.validate_every, mode, folder, settings.export == 'best', tell=told)


def _check_layers(model: Model, layers: Sequence[int]):
  if wrong := [l for l in layers if not 0 <= l < model.num_layers]:
    raise InputError('layers', list(layers), f'{wrong[0]} is not a layer of this model, which has {model.num_layers}.')
  if len(set(layers)) < len(layers) or len(layers) == model.num_layers:
    raise InputError('layers', list(layers), 'names a layer twice, or all of them; name each once and leave one.')
