"""A run that was prepared, and what it has while it works."""

from collections.abc import Callable
import dataclasses
import pathlib
import time
from typing import Any

import jax

from elder_jax.devices import memory
from elder_jax.hf.load import load_model
from elder_jax.hf.source import Source
from elder_jax.log import RunLog
from elder_jax.log import log
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.recipes.context import Choice
from elder_jax.run.config import Config
from elder_jax.text.perplexity import Windows
from elder_jax.training.batches import Batches


@dataclasses.dataclass(frozen=True)
class Job:
  """All that was checked before the first long step."""

  config: Config
  source: Source
  num_removes: list[int]  # the first is that of the exported model
  batches: Batches | None  # of the training text
  held_out: Batches | None  # of the same, never trained on; where --validate_every asks for its loss
  windows: dict[str, Windows]
  tokenizer: Any  # of transformers, where the run reads text
  tasks: Any  # the harness's TaskDict, or None
  prompts: dict[str, list[int]]  # what models answer: {text: its tokens}
  mesh: jax.sharding.Mesh
  shardings: Decoder  # of the parameters, whatever their number of layers
  mode: Mode
  log: RunLog
  torch: bool  # this process checks the export in PyTorch, too
  checks_source: bool  # and the model as it is
  tokenizer_folder: pathlib.Path | None  # of --tokenizer, whose files the export has in place of the source's
  teacher: Source | None = None  # of --teacher
  kept_layers: list[int] | None = None  # those of --teacher that the model has; None: as many, or not known

  @property
  def copies(self) -> bool:
    """Layers are just taken out and nothing is measured: the model need not be in memory."""
    nothing_read = self.batches is None and not self.windows and self.tasks is None
    return nothing_read and self.config.recipes() == ['none']


class Dense:
  """The model as it was loaded, there as long as it is needed; where it is needed once more it is loaded again."""

  def __init__(self, load: Callable[[], Decoder | None]):
    self._load, self._model = load, None

  def get(self) -> Decoder | None:
    if self._model is None:
      self._model = self._load()
    return self._model

  def take(self) -> Decoder | None:
    """For a caller who will use the arrays up: nobody else has the model then."""
    model, self._model = self.get(), None
    return model

  def drop(self):
    """Nobody needs it for now."""
    model, self._model = self._model, None
    memory.free(model)


def load(job: Job, source: Source | None = None) -> Decoder:
  """The model of the run, or another one like it."""
  return load_model(source or job.source, job.config.computation.dtype, job.shardings)


class Run:
  """What a run has while it works: the models that are alive and the results so far."""

  def __init__(self, job: Job, describe: Callable[[], str]):
    """describe: of the devices, for the log."""
    self.job, self._describe = job, describe
    self.dense = Dense(self._load)
    self.teacher = Dense(lambda: load(job, job.teacher) if job.teacher else None)
    self.pruned: Decoder | None = None
    self.choices: dict[tuple[str, int], Choice] = {}
    self.figures: dict[str, dict] = {}  # by stage, of models that were measured
    self.rows: list[dict] = []
    self.answers: dict[str, list[str] | None] = {}  # of 'dense' and 'pruned' to job.prompts
    self.verified: dict = {}
    self.load_seconds = 0.0

  def _load(self) -> Decoder | None:
    job = self.job
    if job.copies:
      return None
    dtype = job.config.computation.dtype
    log(f'loading {job.config.paths.model}, {job.source.num_layers} layers, in {dtype} on {self._describe()}')
    start = time.monotonic()
    model = load(job)
    self.load_seconds += time.monotonic() - start
    return model
