"""How much goes, which layers, and what is done with them: settings."""

from collections.abc import Callable
import dataclasses

from elder_jax.entries import find_entry
from elder_jax.errors import InputError
from elder_jax.methods import METHODS
from elder_jax.methods import find_method
from elder_jax.methods.elder import GateSettings
from elder_jax.methods.mask import MaskSettings
from elder_jax.methods.swaps import SwapSettings
from elder_jax.recipes import RECIPES
from elder_jax.recipes import find_recipe
from elder_jax.settings import Settings
from elder_jax.settings import fields
from elder_jax.settings import name_of
from elder_jax.settings import setting

# Of which a run has one.
HOW_MUCH = (
  'ratio',
  'num_remove',
  'remove_layers',
  'target_params',
  'target_gb',
  'target_speedup',
  'max_ppl_increase',
)
DEFAULT_RATIO = (0.25,)
# By which layers are chosen.
CHOOSING = frozenset({'method', 'score_steps', 'judge_steps', 'judge_by'}).union(
  *(map(name_of, fields(group)) for group in (GateSettings, MaskSettings, SwapSettings))
)


@dataclasses.dataclass(frozen=True)
class RemovalSettings(Settings):
  """How much goes, what, and what is done with it."""

  ratio: tuple[float, ...] | None = setting(
    None,
    'Fraction of the layers to remove, rounded half up to a whole number of layers. Several, as in 0.25,0.1,0.4: a '
    'table and a plot of all; the first is exported. Unset: 0.25. Of this, --num_remove, --remove_layers and the targets '
    'the one given last counts.',
    least=0,
    below=1,
  )
  num_remove: int | None = setting(None, 'Number of layers to remove, in place of --ratio.', least=0)
  remove_layers: tuple[int, ...] | None = setting(
    None,
    'Layers to remove by 0-based number, e.g. 3,5 or 12-18, in place of --ratio and --method. Empty (--remove_layers=): '
    'none.',
  )
  layers_at: str = setting(
    '',
    'The list of layers to cut, by its name in the names of the tensors, as in model.language_model.layers; with '
    '--remove_layers and --recipe=none, for models with several lists.',
    rare=True,
  )
  target_params: int | None = setting(
    None,
    'Parameters that are to be left at most, as in 6B, in place of --ratio: as few layers go as that takes.',
    least=1,
    rare=True,
  )
  target_gb: float | None = setting(
    None,
    'GB (1e9 bytes) of weights that the export is to have at most, in place of --ratio.',
    above=0,
    rare=True,
  )
  target_speedup: float | None = setting(
    None,
    'How many times faster generation is to be, in place of --ratio; estimated by the weights that are read for each '
    'token. `elder_jax speed` measures it on a device.',
    above=1,
    rare=True,
  )
  max_ppl_increase: float | None = setting(
    None,
    'Most that the perplexity on held-out sequences of the training text may rise before any training, as in 10%, in '
    'place of --ratio: as many layers go as that allows, which is searched for.',
    above=0,
    rare=True,
  )
  rounds: int = setting(
    1, 'Rounds of removing and training; each chooses its layers on what the one before has left.', least=1
  )
  method: tuple[str, ...] = setting(
    ('auto',),
    f'How layers are chosen, of {", ".join(METHODS)}, or your own as package.module:NAME. Several, as in auto,sleb: one '
    'table of all; the first is exported.',
  )
  score_steps: int = setting(
    8,
    'Batches of the training text that methods other than elder score the layers on; auto judges by as many more.',
    least=1,
  )
  judge_steps: int = setting(
    0,
    'Steps of the training after which auto judges the best three of its candidates again; 0: after absorbing alone.',
    least=0,
    rare=True,
  )
  judge_by: str = setting(
    'loss',
    'What auto judges the best three by: loss, on text held out; a task of --tasks, by its accuracy; or a function of your '
    'own, package.module:NAME, of a Decoder and the Context, which gives a number, the lower the better.',
    rare=True,
  )
  recipe: str = setting(
    'absorb_then_train',
    f'What happens to the chosen layers, of {", ".join(RECIPES)}, or your own as package.module:NAME.',
  )
  compare: tuple[str, ...] = setting(
    ('none',), 'Further recipes, run on the same layers and batches for the report only; empty (--compare=): no others.'
  )

  def __post_init__(self):
    super().__post_init__()
    given = [name for name in HOW_MUCH if getattr(self, name) is not None]
    if len(given) > 1:
      others = ' and '.join(f'--{name}' for name in given[1:])
      raise InputError(
        given[0],
        getattr(self, given[0]),
        f'and {others}: say how many layers go in one way only; leave out the others.',
      )
    layers = self.remove_layers or ()
    if len(set(layers)) < len(layers):
      raise InputError('remove_layers', layers, 'names a layer twice; name each once.')
    if not self.method:
      raise InputError('method', '', 'is empty; give a method, as in --method=auto.')
    for name in self.method:
      find_method(name)
    if not find_recipe(self.recipe).exportable:
      raise InputError(
        'recipe', self.recipe, 'leaves no stock checkpoint, so it cannot be exported; use --compare for its row.'
      )
    for name in self.compare:
      find_recipe(name, 'compare')
    if ':' in self.judge_by:
      find_entry('judge_by', self.judge_by, {}, Callable)
