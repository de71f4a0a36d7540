"""An entry of the table METHODS: a way to choose the layers that go."""

from collections.abc import Callable
import dataclasses
from typing import Any

from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context


@dataclasses.dataclass(frozen=True)
class Method:
  """Fields:

  choose: (context, number of layers) -> Choice; never asked for 0 layers.
  help: the line of --help and of the documentation.
  paper: its arXiv number.
  nested: the layers for n are the first of those for more, so that a sweep asks once.
  spared: layers at either end that it never chooses.
  refuses: (settings, layers of the model, number to remove) -> why it cannot choose so many, or ''. Unset: by `spared`.
  programs: (shapes, number of layers) -> its heaviest programs, for the plan.
  reads: the settings that it reads, besides the text and the seed.
  merges: its choice has `merges`, of layers that are merged rather than removed.
  reads_text: False: it runs no text through the model. What does has `programs`.
  """

  choose: Callable[[Context, int], Choice]
  help: str
  paper: str = ''
  nested: bool = True
  spared: tuple[int, int] = (0, 0)
  refuses: Callable[[Any, int, int], str] | None = None
  programs: Callable[[Shapes, int], list[Program]] | None = None
  reads: tuple[str, ...] = ('score_steps',)
  merges: bool = False
  reads_text: bool = True

  def __post_init__(self):
    if self.reads_text and self.programs is None:
      raise ValueError('a method that reads text has programs, by which the plan knows what it takes')

  def why_not(self, settings, num_layers: int, num_remove: int) -> str:
    """Why it cannot choose so many layers, or ''."""
    if self.refuses is not None:
      return self.refuses(settings, num_layers, num_remove)
    most = max(0, num_layers - sum(self.spared))
    if num_remove <= most:
      return ''
    return (
      f'may choose from {most} of the {num_layers} layers, {num_remove} are to be removed; remove fewer (--num_remove or '
      '--ratio) or use another --method.'
    )
