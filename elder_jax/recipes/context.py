"""Context, the input of methods and recipes, and Choice, the layers that a method chose."""

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
  """The layers that a method chose to remove.

  Attributes:
    removed: 0-based layer numbers, in the order of removal (a contiguous block: ascending). The first n of them are the
      choice for n layers if Method.nested is True.
    scores: One number per layer, or per first layer of a block; empty if the method has no scores. The unit depends on
      the method.
    about: Anything else for the report, as JSON: `gates`, `merges`, `candidates`, …
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
  """Everything that a method or a recipe may read."""

  model: Decoder  # the dense model; all gates are 1
  batches: Batches  # tokens [B, T] on the devices: one pass over the training text; training may repeat it
  settings: Any  # run.config.Config
  mode: Mode = Mode()
  log: Log = QUIET
  checkpoints: Callable[[str, int], Checkpoints | None] = lambda stage, steps: None
  # Called with arrays of `model` as soon as they are no longer needed (memory.free). None: the model is left unchanged.
  free: Callable | None = None
  # The function of --judge_by, lower is better. None: the held-out loss.
  judge: Callable[[Decoder], float] | None = None
  # Name of a stage -> the results of its search so far, stored with the checkpoints of the run.
  notes: Callable[[str], MutableMapping[str, Any]] = lambda stage: {}
  score_steps: int | None = None  # number of batches to score layers on; None: the setting --score_steps

  @property
  def scored(self) -> Batches:
    """The batches to score layers on."""
    return self.batches[: self.score_steps or self.settings.removal.score_steps]

  @functools.cached_property
  def fitted(self) -> Batches:
    """The batches that closed forms read. They come from the first pass of training, so no recipe sees more tokens."""
    return self.batches[: self.settings.fitted_steps]
