"""The Python API of elder_jax.

Example:

    import elder_jax as ej
    dense = ej.load('HuggingFaceTB/SmolLM2-135M')
    data = ej.batches(dense, 'wiki.txt', seq_len=512, num_sequences=128)
    layers = ej.choose(dense, 7, data).removed
    small = ej.absorb(dense, layers, data)
    small = ej.train(small, data, ej.TrainSettings(steps=100), teacher=dense)
    print(ej.perplexity(small, 'test.txt'))
    ej.export(small, 'out')

Every function returns a new Model and leaves its arguments unchanged. Bad input raises InputError, which has the attributes
`setting`, `value` and `why`. Layer numbers are 0-based.
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
  """A language model on its devices, and the checkpoint that it was loaded from. Made by `load`.

  Attributes:
    kept: The layers that the model still has, as layer numbers of the checkpoint.
  """

  decoder: Decoder
  source: Source
  kept: tuple[int, ...]
  mode: Mode
  mesh: jax.sharding.Mesh
  _scratch: Any = dataclasses.field(default=None, repr=False)  # a temporary folder, kept as long as the model

  @property
  def num_layers(self) -> int:
    """The number of layers."""
    return self.decoder.num_layers

  @property
  def num_params(self) -> int:
    """The number of parameters."""
    return pruning.num_params(self.decoder)

  @functools.cached_property
  def tokenizer(self):
    """The tokenizer of the checkpoint, a transformers tokenizer."""
    return data.load_tokenizer(str(self.source.files))

  def _with(self, decoder: Decoder, removed: Sequence[int] = ()) -> 'Model':
    kept = tuple(l for i, l in enumerate(self.kept) if i not in set(removed))
    return dataclasses.replace(self, decoder=decoder, kept=kept)


def load(name: str, *, dtype: str = 'float32', mesh: Sequence[int] = (-1, 1, 1), remat: str = 'dots') -> Model:
  """Returns the model of a checkpoint, for example load('HuggingFaceTB/SmolLM2-135M').

  Args:
    name: A Hugging Face folder, a hub id (owner/name) or a .gguf file.
    dtype: Dtype of weights and computation: float32 or bfloat16. Trained weights become float32.
    mesh: Number of devices for data, fsdp and tensor parallelism. One of them may be -1: all remaining devices.
    remat: What the backward pass recomputes to save memory: none, dots, dots_no_batch or full.

  Raises:
    InputError: the checkpoint cannot be read or is not supported, or an argument is invalid.
  """
  Config.of(dtype=dtype, remat=remat)  # raises InputError for invalid values
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
  """Returns batches of tokens, int32 [batch_size, seq_len], drawn from a text with the tokenizer of `model`.

  Args:
    text: A file, a folder or a hub data set; or a list of [name=]source[@weight] entries, to blend several.
    seq_len: Tokens per sequence.
    num_sequences: Number of sequences in all batches together.
    seed: Seed of the choice and order of the sequences.
    text_column: Column that holds the text, in files with columns.
    bos: Where to put a BOS token: auto, tokenizer, window or none.
    **settings: Other settings of the training text by name, such as train_tokens, documents or train_on.

  Raises:
    InputError: the text cannot be read or is too short, or an argument is invalid.
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
  """Chooses n layers to remove, for example choose(dense, 7, data, 'cosine_block').removed.

  Args:
    n: Number of layers to remove.
    batches: Calibration data.
    method: A key of METHODS, or your own method as package.module:NAME.
    seed: Seed of methods that draw at random.
    score_steps: Number of batches to score layers on. `auto` compares its candidates on as many more.

  Returns:
    A Choice. `removed` holds n layer numbers of this model, `scores` the scores of the method.

  Raises:
    InputError: the method is unknown or cannot choose n layers.
  """
  if not 0 <= n < model.num_layers:
    raise InputError('n', n, f'must be at least 0 and below {model.num_layers}, the layers of the model.')
  with jax.set_mesh(model.mesh):
    return methods.choose(method, _context(model, batches, log, seed=seed, score_steps=score_steps), n)


def remove(model: Model, layers: Sequence[int]) -> Model:
  """Returns the model without some layers, otherwise unchanged. layers: layer numbers of this model.

  Raises:
    InputError: a layer does not exist or is named twice, or no layer would be left.
  """
  _check_layers(model, layers)
  with jax.set_mesh(model.mesh):
    return model._with(pruning.prune(model.decoder, list(layers)), layers)


def absorb(model: Model, layers: Sequence[int], batches: Batches, *, log: Log = QUIET) -> Model:
  """Returns the model without some layers, with the layers around each gap refitted by ridge regression to compensate.

  The architecture stays the same; only weights of existing tensors change.

  Args:
    layers: Layer numbers of this model.
    batches: Calibration data.

  Raises:
    InputError: the architecture cannot be refitted, or `layers` is invalid as in `remove`.
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
  """Returns the trained model. Trained weights are float32; with LoRA, merged weights have the dtype of the model.

  Args:
    settings: `steps=None` is one pass over the batches. Batches repeat if there are fewer than steps.
    teacher: Model to distil from, for example the dense one. The weight of the distillation loss is settings.distill, or
      0.5 if neither that nor settings.distill_hidden is set.
    penalise: Layers whose updates are penalised (stage 2 of ELDeR), to be removed afterwards.
    checkpoints: Folder to save checkpoints in and to resume from; empty: none.
    validation: Held-out batches. Their loss is measured every settings.validate_every steps and passed to `log`.

  Raises:
    InputError: the settings do not fit the model, the teacher or each other.
    NonFiniteLoss: the loss became infinite or NaN.
  """
  _check_layers(model, penalise)
  if teacher is model:
    raise InputError('teacher', teacher.source.name, 'is the model itself; pass the dense model.')
  if settings.taught and teacher is None:
    raise InputError(
      settings.taught_by, getattr(settings, settings.taught_by), 'needs a teacher; pass the dense model as teacher.'
    )
  steps = len(batches) if settings.steps is None else settings.steps
  distill = (0.5,) if teacher and not settings.taught else settings.distill
  settings = dataclasses.replace(settings, steps=steps, distill=distill)
  if settings.validate_every and validation is None:
    raise InputError('validate_every', settings.validate_every, 'needs held-out batches; pass them as validation.')
  kept = _layers_of_teacher(model, teacher, settings) if settings.distill_hidden else None
  saved = Checkpoints(user_path(checkpoints), 100, steps) if checkpoints else None
  mode = dataclasses.replace(model.mode, penalty=settings.penalty, penalty_scale=settings.penalty_scale)
  tokens = batches.batch_size * batches.seq_len
  progress, record = log.progress('training', tokens=tokens), log.steps('train', tokens)

  def on_step(step: int, metrics: dict):
    record(step, metrics)
    progress(step + 1, steps, f'loss {metrics["loss"]:.4f}')

  taught = teacher.decoder if teacher else None
  with jax.set_mesh(model.mesh), tempfile.TemporaryDirectory() as scratch:
    folder = user_path(f'{checkpoints or pathlib.Path(scratch) / "train"}.held_out')
    seen = _validation(validation, settings, mode, folder, log) if settings.validate_every else None
    first = model.decoder, list(penalise), settings, mode, batches, on_step, saved, taught, model.mode.dtype
    made = trainer.train(*first, validation=seen, kept=kept)
  return model._with(made)


def export(model: Model, folder: str, *, dtype: str = '', shard_gb: float = 5.0, text_only: bool = False) -> dict:
  """Writes an ordinary Hugging Face checkpoint. Reads it back and compares its logits before the folder gets its name.

  Args:
    folder: Folder to write; it must not exist.
    dtype: Dtype of the tensors; empty: that of the source checkpoint.
    shard_gb: Maximum size of one safetensors file, in GB (1e9 bytes).
    text_only: Whether to write only the language model of a multimodal model.

  Returns:
    The largest difference of a logit, under 'jax', and under 'torch' if PyTorch is installed; see verify.check.

  Raises:
    InputError: the folder exists, or an argument is invalid.
    ExportMismatch: the logits of the written folder differ from those of the model.
  """
  output = Config.of(export_dtype=dtype, shard_gb=shard_gb).output
  final = user_path(folder)
  if os.path.lexists(final):
    raise InputError('folder', folder, 'already exists; give a new folder.')
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
  """Performs a whole run, like `elder_jax prune`, and returns the content of report.json.

  Args:
    config: The settings, for example Config.of(model='HuggingFaceTB/SmolLM2-135M', workdir='runs/x', num_remove=7).

  Raises:
    InputError: a setting or a file is invalid.
  """
  return series.run(config)


def _context(model: Model, batches: Batches, log: Log, **settings) -> Context:
  rows, batch_size, seq_len = len(batches.rows), batches.batch_size, batches.seq_len
  num_sequences = rows // batch_size * batch_size
  config = Config.of(num_sequences=num_sequences, batch_size=batch_size, seq_len=seq_len, **settings)
  return Context(model.decoder, batches, config, model.mode, log)


def _layers_of_teacher(model: Model, teacher: Model, settings: TrainSettings) -> list[int]:
  """Returns the teacher's layer that corresponds to each layer of the model. Raises InputError if there is none."""
  if model.source.name != teacher.source.name or not set(model.kept) <= set(teacher.kept):
    raise InputError(
      'distill_hidden',
      settings.distill_hidden,
      'needs a teacher that was loaded from the same checkpoint and still has all layers of the model; pass such a teacher '
      'or leave out distill_hidden.',
    )
  return [teacher.kept.index(l) for l in model.kept]


def _validation(batches: Batches, settings: TrainSettings, mode: Mode, folder: pathlib.Path, log: Log) -> Validation:
  record = log.steps('train.held_out')

  def on_step(step: int, loss: float):
    record(step, {'held_out_loss': loss})

  return Validation(batches, settings.validate_every, mode, folder, settings.export == 'best', tell=on_step)


def _check_layers(model: Model, layers: Sequence[int]):
  if wrong := [l for l in layers if not 0 <= l < model.num_layers]:
    raise InputError('layers', list(layers), f'{wrong[0]} is not a layer of this model, which has {model.num_layers}.')
  if len(set(layers)) < len(layers) or len(layers) == model.num_layers:
    raise InputError(
      'layers', list(layers), 'names a layer twice, or all layers; name each once and keep at least one.'
    )
