"""What is done with the chosen layers: one entry per recipe. A new one is an entry here and its file."""

from elder_jax.entries import find_entry
from elder_jax.errors import InputError
from elder_jax.recipes import absorb
from elder_jax.recipes.recipe import Recipe
from elder_jax.recipes.recipe import start_removed
from elder_jax.recipes.recipe import start_whole

_ABSORB = {
  'start': absorb.start_absorbed,
  'reads_text': True,
  'refuses': absorb.why_not_absorb,
  'programs': absorb.programs_absorb,
}
_REPLACE = {
  'start': absorb.start_replaced,
  'reads_text': True,
  'refuses': absorb.why_not_replace,
  'programs': absorb.programs_replace,
}

# In the order of the report's rows.
RECIPES: dict[str, Recipe] = {
  'none': Recipe('direct removal', 'the layers are removed', start_removed, merges=True),
  'prune_then_train': Recipe('prune, then train', 'removed, then LM training', start_removed, trains=True, merges=True),
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
    'the layer before each gap is refitted by ridge regression to write what the removed layers would write',
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
