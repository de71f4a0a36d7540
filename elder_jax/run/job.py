"""Job, a prepared run; and Run, its state while it works."""

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
  """The inputs and settings of a run, checked before any long work."""

  config: Config
  source: Source
  num_removes: list[int]  # numbers of layers to remove; the first is for the exported model
  batches: Batches | None  # of the training text
  held_out: Batches | None  # of the same text, never trained on; only with --validate_every
  windows: dict[str, Windows]
  tokenizer: Any  # of transformers, if the run reads text
  tasks: Any  # the harness's TaskDict, or None
  prompts: dict[str, list[int]]  # {text: its tokens}
  mesh: jax.sharding.Mesh
  shardings: Decoder  # of the parameters, for any number of layers
  mode: Mode
  log: RunLog
  torch: bool  # this process also checks the export in PyTorch
  checks_source: bool  # and the unpruned model
  tokenizer_folder: pathlib.Path | None  # of --tokenizer; its files replace the source's in the export
  teacher: Source | None = None  # of --teacher
  kept_layers: list[int] | None = None  # those of --teacher that the model has; None: the same number, or unknown

  @property
  def copies(self) -> bool:
    """Whether layers are only removed and nothing is measured, so that the model need not be loaded."""
    nothing_read = self.batches is None and not self.windows and self.tasks is None
    return nothing_read and self.config.recipes() == ['none']


class Dense:
  """The loaded model. It is dropped when it is not needed and loaded again when it is."""

  def __init__(self, load: Callable[[], Decoder | None]):
    self._load, self._model = load, None

  def get(self) -> Decoder | None:
    if self._model is None:
      self._model = self._load()
    return self._model

  def take(self) -> Decoder | None:
    """Hands the model over to a caller that will donate or free its arrays."""
    model, self._model = self.get(), None
    return model

  def drop(self):
    """Frees the model."""
    model, self._model = self._model, None
    memory.free(model)


def load(job: Job, source: Source | None = None) -> Decoder:
  """Loads the model of the run, or another source with the same shardings."""
  return load_model(source or job.source, job.config.computation.dtype, job.shardings)


class Run:
  """The state of a run: the models that are loaded and the results so far."""

  def __init__(self, job: Job, describe: Callable[[], str]):
    """describe: returns a description of the devices, for the log."""
    self.job, self._describe = job, describe
    self.dense = Dense(self._load)
    self.teacher = Dense(lambda: load(job, job.teacher) if job.teacher else None)
    self.pruned: Decoder | None = None
    self.choices: dict[tuple[str, int], Choice] = {}
    self.figures: dict[str, dict] = {}  # {stage: measurements}
    self.rows: list[dict] = []
    self.answers: dict[str, list[str] | None] = {}  # {'dense' or 'pruned': answers to job.prompts}
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
