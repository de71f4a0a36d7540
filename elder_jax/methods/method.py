"""Method: an entry of the table METHODS, one way to choose the layers to remove."""

from collections.abc import Callable
import dataclasses
from typing import Any

from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to choose the layers to remove.

  Attributes:
    choose: (Context, number of layers to remove) -> Choice. The number is at least 1.
    help: What the method removes, in one line of documentation.
    paper: arXiv number of the paper, or ''.
    nested: Whether the choice of n layers is the first n of a larger choice. If so, a sweep calls `choose` once.
    spared: (n, m): it never chooses the first n and the last m layers.
    refuses: (settings, number of layers, number to remove) -> why it cannot choose that many, or ''. None: decided by
      `spared`.
    programs: (Shapes, number to remove) -> its heaviest programs, for the plan. Required if `reads_text`.
    reads: Names of the settings that it reads, besides those of the text and the seed.
    merges: Whether it merges layers instead of removing them; its Choice.about then holds `merges`.
    reads_text: Whether it runs text through the model.

  Raises:
    ValueError: `reads_text` without `programs`.
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
      raise ValueError('a method that reads text needs `programs`, from which the plan estimates its memory and time')

  def why_not(self, settings, num_layers: int, num_remove: int) -> str:
    """Returns why the method cannot choose `num_remove` layers, or ''."""
    if self.refuses is not None:
      return self.refuses(settings, num_layers, num_remove)
    most = max(0, num_layers - sum(self.spared))
    if num_remove <= most:
      return ''
    return (
      f'can remove at most {most} of the {num_layers} layers, not {num_remove}; remove fewer (--num_remove or --ratio) or '
      'use another --method.'
    )
