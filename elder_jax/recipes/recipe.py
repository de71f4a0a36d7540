"""An entry of the table RECIPES: what is done with the chosen layers."""

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
  """Fields:

  label: in tables.
  help: the line of --help and of the documentation.
  start: (context, choice) -> the pruned model, or the one to be trained.
  trains: the same steps of training follow as in all other recipes that train.
  removes_last: the chosen layers are penalised in the training and removed after it (ELDeR).
  reads_text: `start` reads the training text.
  refuses: of a model's Spec: why this recipe cannot work on it, or ''.
  exportable: False: a row of the table only, since no stock checkpoint holds the result.
  programs: (shapes) -> the heaviest programs of `start`, the removal itself apart.
  heals: it needs no layer to be removed: what is trained was pruned before.
  only: the one parameter of the layers that its training changes, by name; empty: those of --trainable.
  patches: the result has a matrix on the stream after each layer (patch.py).
  merges: what a method that merges layers (laco) has found is merged; else the recipe starts from the layers as they are.
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
  """The model without the layers; those that laco has merged are merged."""
  if merges := choice.about.get('merges'):
    return merging.merge(context.model, merges)
  return pruning.prune(context.model, choice.removed, context.free)


def start_whole(context: Context, choice: Choice) -> Decoder:
  """The model with all layers, gates at 1."""
  del choice
  return pruning.with_gates(context.model, 1.0)
