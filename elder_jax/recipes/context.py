"""What methods and recipes get, and what a method gives: which layers go."""

from collections.abc import Callable
from collections.abc import MutableMapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax

from elder_jax.log import QUIET
from elder_jax.log import Log
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.checkpoints import Checkpoints

Batches = Sequence[jax.Array]


@dataclasses.dataclass(frozen=True)
class Choice:
  """The layers to remove, 0-based.

  removed: in the order of their removal (a contiguous block of layers: ascending). A method whose layers for n are the
    first of those for more has them in that order.
  scores: one per layer, or one per start of a block of layers; empty where the method scores nothing. The unit is the
    method's own.
  about: what else the report holds of it, as JSON: `gates`, `merges`, `candidates`.
  """

  removed: list[int]
  scores: list[float] = dataclasses.field(default_factory=list)
  about: dict[str, Any] = dataclasses.field(default_factory=dict)

  def first(self, num_remove: int) -> 'Choice':
    return dataclasses.replace(self, removed=self.removed[:num_remove])

  def to_json(self) -> dict:
    return {'chosen': self.removed, 'scores': self.scores, 'gates': []} | self.about

  @classmethod
  def from_json(cls, value: dict) -> 'Choice':
    about = {key: v for key, v in value.items() if key not in ('chosen', 'scores')}
    return cls(value['chosen'], value.get('scores', []), about)


@dataclasses.dataclass(frozen=True)
class Context:
  """What a method chooses by, and what a recipe works with."""

  model: Decoder  # dense, gates at 1
  batches: Batches  # [B, T] tokens on the devices: one pass over the training text; training goes on beyond its end
  settings: Any  # run.config.Config
  mode: Mode = Mode()
  log: Log = QUIET
  checkpoints: Callable[[str, int], Checkpoints | None] = lambda stage, steps: None
  # Called with arrays of `model` that are not needed any more, as soon as they are not (memory.free). None: the model
  # stays as it is.
  free: Callable | None = None
  # Of --judge_by, the lower the better. None: the loss on text held out.
  judge: Callable[[Decoder], float] | None = None
  # What a search has found so far, by the name of its stage; kept where the run keeps its checkpoints.
  notes: Callable[[str], MutableMapping[str, Any]] = lambda stage: {}
  score_steps: int | None = None  # batches that scores are taken on; unset: those of the settings

  @property
  def scored(self) -> Batches:
    """The batches that layers are scored on."""
    return self.batches[: self.score_steps or self.settings.removal.score_steps]

  @functools.cached_property
  def fitted(self) -> Batches:
    """The batches that closed forms read, of the first pass of training, so that no recipe sees more tokens."""
    return self.batches[: self.settings.fitted_steps]
