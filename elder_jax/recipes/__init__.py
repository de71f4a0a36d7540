"""The table RECIPES: what happens to the chosen layers. A new recipe is one file here and one entry in the table."""

from elder_jax.entries import find_entry
from elder_jax.errors import InputError
from elder_jax.recipes import absorb
from elder_jax.recipes import ghosted
from elder_jax.recipes import linear_patch
from elder_jax.recipes import prune_comp
from elder_jax.recipes import replace_linear
from elder_jax.recipes.recipe import Recipe
from elder_jax.recipes.recipe import start_removed
from elder_jax.recipes.recipe import start_whole

_ABSORB = {
  'start': absorb.start_absorbed,
  'reads_text': True,
  'refuses': absorb.why_not,
  'programs': absorb.programs,
}
_REPLACE = {
  'start': replace_linear.start,
  'reads_text': True,
  'refuses': replace_linear.why_not,
  'programs': replace_linear.programs,
}
_COMPENSATE = {
  'start': prune_comp.start,
  'reads_text': True,
  'refuses': prune_comp.why_not,
  'programs': prune_comp.programs,
}
_PATCH = {
  'start': linear_patch.start,
  'reads_text': True,
  'refuses': linear_patch.why_not,
  'programs': linear_patch.programs,
  'patches': True,
  'exportable': False,
}
_GHOST = {
  'start': ghosted.start,
  'reads_text': True,
  'programs': ghosted.programs,
  'patches': True,
  'exportable': False,
}

# The rows of the report are in this order.
RECIPES: dict[str, Recipe] = {
  'none': Recipe('direct removal', 'removes the layers', start_removed, merges=True),
  'prune_then_train': Recipe(
    'prune, then train', 'removes the layers, then trains', start_removed, trains=True, merges=True
  ),
  'prune_comp': Recipe(
    'rescaled',
    'rescales the weights below each gap by one factor, so that the hidden states keep their magnitude (Prune&Comp)',
    **_COMPENSATE,
  ),
  'prune_comp_then_train': Recipe('rescaled, then train', 'prune_comp, then trains', trains=True, **_COMPENSATE),
  'linear_patch': Recipe(
    'LinearPatch',
    'multiplies the hidden state at each gap by a matrix that rescales Hadamard-rotated channels (LinearPatch); for '
    '--compare only',
    **_PATCH,
  ),
  'linear_patch_tuned': Recipe(
    'LinearPatch, tuned',
    'linear_patch, then trains only these matrices; for --compare only',
    trains=True,
    only='patch',
    **_PATCH,
  ),
  'ghosted': Recipe(
    'Ghosted Layers', 'inserts a least-squares linear map at each gap (Ghosted Layers); for --compare only', **_GHOST
  ),
  'ghosted_then_train': Recipe(
    'Ghosted Layers, then train', 'ghosted, then trains; for --compare only', trains=True, **_GHOST
  ),
  'replace_linear': Recipe(
    'replaced by a linear map',
    'replaces each removed block by a least-squares linear map, folded into the layer before it (ReplaceMe)',
    **_REPLACE,
  ),
  'replace_linear_then_train': Recipe(
    'replaced by a linear map, then train', 'replace_linear, then trains', trains=True, **_REPLACE
  ),
  'regularize': Recipe(
    'regularise, then prune',
    "trains with a penalty on the chosen layers' updates, or with annealed gates, then removes the layers (ELDeR)",
    start_whole,
    trains=True,
    removes_last=True,
  ),
  'absorb': Recipe(
    'absorb',
    'refits the layers around each gap by ridge regression to compensate for the removed layers',
    **_ABSORB,
  ),
  'absorb_then_train': Recipe('absorb, then train', 'absorb, then trains', trains=True, **_ABSORB),
  'heal': Recipe(
    'healed',
    'trains a model that was pruned before; see elder_jax heal',
    start_removed,
    trains=True,
    heals=True,
    merges=True,
  ),
}


def find_recipe(name: str, setting: str = 'recipe') -> Recipe:
  """Returns the recipe called `name`, or the user's own if `name` is package.module:NAME. Raises InputError."""
  return find_entry(setting, name, RECIPES, Recipe)


def label_of(name: str) -> str:
  """Returns the label of a recipe in tables, or `name` if there is no such recipe any more."""
  try:
    return find_recipe(name).label
  except InputError:
    return name
