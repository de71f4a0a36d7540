"""Settings of the removal: how many layers, which ones, and by which recipe."""

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

# Ways to set how many layers are removed; a run uses one of them.
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
# Settings that the choice of layers depends on.
CHOOSING = frozenset({'method', 'score_steps', 'judge_steps', 'judge_by'}).union(
  *(map(name_of, fields(group)) for group in (GateSettings, MaskSettings, SwapSettings))
)


@dataclasses.dataclass(frozen=True)
class RemovalSettings(Settings):
  """How many layers are removed, which ones, and by which recipe."""

  ratio: tuple[float, ...] | None = setting(
    None,
    'Fraction of the layers to remove, rounded half up to a whole number of layers. Several, as in 0.25,0.1,0.4: a '
    'table and a plot of all; the first is exported. Unset: 0.25. If several of --ratio, --num_remove, --remove_layers '
    'and the targets are given, the last one is used.',
    least=0,
    below=1,
  )
  num_remove: int | None = setting(None, 'Number of layers to remove, instead of --ratio.', least=0)
  remove_layers: tuple[int, ...] | None = setting(
    None,
    'Layers to remove, 0-based, as in 3,5 or 12-18, instead of --ratio and --method. Empty (--remove_layers=): none.',
  )
  layers_at: str = setting(
    '',
    'For models with several lists of layers: the one to cut, as in model.language_model.layers. Needs --remove_layers '
    'and --recipe=none.',
    rare=True,
  )
  target_params: int | None = setting(
    None,
    'Largest number of parameters of the pruned model, as in 6B, instead of --ratio. Removes as few layers as possible.',
    least=1,
    rare=True,
  )
  target_gb: float | None = setting(
    None,
    'Largest size of the exported weights in GB (1e9 bytes), instead of --ratio. Removes as few layers as possible.',
    above=0,
    rare=True,
  )
  target_speedup: float | None = setting(
    None,
    'Factor by which generation must be faster, instead of --ratio. Estimated from the weights read per token; '
    '`elder_jax speed` measures it on a device.',
    above=1,
    rare=True,
  )
  max_ppl_increase: float | None = setting(
    None,
    'Largest increase of the perplexity on held-out sequences of the training text, before any training, as in 10%. '
    'Instead of --ratio: searches for the largest number of layers within this limit.',
    above=0,
    rare=True,
  )
  rounds: int = setting(
    1, 'Rounds of removing and training. Each round chooses layers of the model from the previous round.', least=1
  )
  method: tuple[str, ...] = setting(
    ('auto',),
    f'How layers are chosen: {", ".join(METHODS)}, or your own as package.module:NAME. Several, as in auto,sleb: one '
    'table of all; the first is exported.',
  )
  score_steps: int = setting(
    8,
    'Batches on which methods other than elder score layers. auto judges its candidates on as many more.',
    least=1,
  )
  judge_steps: int = setting(
    0,
    'Training steps after which auto judges its best three candidates again; 0: no training, only absorb.',
    least=0,
    rare=True,
  )
  judge_by: str = setting(
    'loss',
    'How auto judges its best three candidates. loss: by the loss on held-out text. A task of --tasks: by its accuracy. '
    'package.module:NAME: by your own function of (Decoder, Context), which returns a number; lower is better.',
    rare=True,
  )
  recipe: str = setting(
    'absorb_then_train',
    f'How layers are removed: {", ".join(RECIPES)}, or your own as package.module:NAME.',
  )
  compare: tuple[str, ...] = setting(
    ('none',), 'Other recipes to run on the same layers and batches, for the report only. Empty (--compare=): none.'
  )

  def __post_init__(self):
    super().__post_init__()
    given = [name for name in HOW_MUCH if getattr(self, name) is not None]
    if len(given) > 1:
      others = ' and '.join(f'--{name}' for name in given[1:])
      raise InputError(
        given[0],
        getattr(self, given[0]),
        f'and {others} all set how many layers are removed; give only one of them.',
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
        'recipe',
        self.recipe,
        'makes a model that no standard checkpoint can hold, so it cannot be exported; move it to --compare.',
      )
    for name in self.compare:
      find_recipe(name, 'compare')
    if ':' in self.judge_by:
      find_entry('judge_by', self.judge_by, {}, Callable)
