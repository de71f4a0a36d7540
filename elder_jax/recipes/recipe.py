"""Recipe: an entry of the table RECIPES, one way to treat the chosen layers."""

from collections.abc import Callable
import dataclasses

from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.spec import Spec
from elder_jax.recipes import merging
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A way to treat the chosen layers.

  Attributes:
    label: Name in tables.
    help: What the recipe does, in one line of documentation.
    start: (Context, Choice) -> the pruned model, or the model to train.
    trains: Whether training follows, with the same settings as in all other recipes that train.
    removes_last: Whether the chosen layers are penalised in training and removed after it (ELDeR).
    reads_text: Whether `start` reads the training text.
    refuses: Spec of a model -> why the recipe does not work for it, or ''.
    exportable: False if no stock checkpoint can hold the result; the recipe is then a row of the table only.
    programs: (Shapes) -> the heaviest programs of `start`, without the removal itself.
    heals: Whether it trains a model that was pruned before and removes no layer.
    only: Name of the only layer parameter that training changes; empty: --trainable decides.
    patches: Whether the result has a matrix after each layer (patch.py).
    merges: Whether it merges the layers that a merging method (laco) chose. False: it removes them.
  """

  label: str
  help: str
  start: Callable[[Context, Choice], Decoder]
  trains: bool = False
  removes_last: bool = False
  reads_text: bool = False
  refuses: Callable[[Spec], str] = lambda spec: ''
  exportable: bool = True
  programs: Callable[[Shapes], list[Program]] = lambda shapes: []
  heals: bool = False
  only: str = ''
  patches: bool = False
  merges: bool = False


def start_removed(context: Context, choice: Choice) -> Decoder:
  """Returns the model without the chosen layers; if laco chose them, they are merged first."""
  if merges := choice.about.get('merges'):
    return merging.merge(context.model, merges)
  return pruning.prune(context.model, choice.removed, context.free)


def start_whole(context: Context, choice: Choice) -> Decoder:
  """Returns the model with all layers and with all gates set to 1."""
  del choice
  return pruning.with_gates(context.model, 1.0)
