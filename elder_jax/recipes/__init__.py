"""What is done with the chosen layers: one entry per recipe. A new one is an entry here and its file."""

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

# In the order of the report's rows.
RECIPES: dict[str, Recipe] = {
  'none': Recipe('direct removal', 'the layers are removed', start_removed, merges=True),
  'prune_then_train': Recipe('prune, then train', 'removed, then LM training', start_removed, trains=True, merges=True),
  'prune_comp': Recipe('rescaled', 'Prune&Comp: what is below each gap is rescaled by one factor', **_COMPENSATE),
  'prune_comp_then_train': Recipe('rescaled, then train', 'the same, then LM training', trains=True, **_COMPENSATE),
  'linear_patch': Recipe(
    'LinearPatch', 'LinearPatch: a matrix at each gap rescales the rotated channels; for --compare', **_PATCH
  ),
  'linear_patch_tuned': Recipe(
    'LinearPatch, tuned', 'the same, then only the matrices are trained', trains=True, only='patch', **_PATCH
  ),
  'ghosted': Recipe('Ghosted Layers', 'Ghosted Layers: a matrix at each gap by least squares; for --compare', **_GHOST),
  'ghosted_then_train': Recipe('Ghosted Layers, then train', 'the same, then LM training', trains=True, **_GHOST),
  'replace_linear': Recipe(
    'replaced by a linear map',
    'ReplaceMe: a linear map folded into the layer before, by least squares',
    **_REPLACE,
  ),
  'replace_linear_then_train': Recipe(
    'replaced by a linear map, then train', 'the same, then LM training', trains=True, **_REPLACE
  ),
  'regularize': Recipe(
    'regularise, then prune',
    'ELDeR: trained with a penalty on what the layers add to the stream, or with annealed gates, then removed',
    start_whole,
    trains=True,
    removes_last=True,
  ),
  'absorb': Recipe(
    'absorb',
    'the layers around each gap are refitted by ridge regression to make up for the removed layers',
    **_ABSORB,
  ),
  'absorb_then_train': Recipe('absorb, then train', 'the same, then LM training', trains=True, **_ABSORB),
  'heal': Recipe(
    'healed',
    'a model that was pruned before is trained; see elder_jax heal',
    start_removed,
    trains=True,
    heals=True,
    merges=True,
  ),
}


def find_recipe(name: str, setting: str = 'recipe') -> Recipe:
  """The recipe of a name, or of the user's own package.module:NAME. Raises InputError."""
  return find_entry(setting, name, RECIPES, Recipe)


def label_of(name: str) -> str:
  """How tables call a recipe; one that is not to be had any more by its name."""
  try:
    return find_recipe(name).label
  except InputError:
    return name
