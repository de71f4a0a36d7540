"""The table METHODS: ways to choose the layers to remove. A new method is one file here and one entry in the table."""

import numpy as np

from elder_jax.entries import find_entry
from elder_jax.errors import InputError
from elder_jax.methods import ablation
from elder_jax.methods import auto
from elder_jax.methods import elder
from elder_jax.methods import laco
from elder_jax.methods import mask
from elder_jax.methods import order
from elder_jax.methods import stream
from elder_jax.methods import swaps
from elder_jax.methods import weights
from elder_jax.methods.method import Method
from elder_jax.methods.scores import KEPT_FIRST
from elder_jax.methods.scores import KEPT_LAST
from elder_jax.methods.scores import by_scores
from elder_jax.recipes.context import Choice
from elder_jax.recipes.context import Context

_KEPT = (KEPT_FIRST, KEPT_LAST)

_SCORING: dict[str, Method] = {
  'shortgpt': Method(
    by_scores(stream.shortgpt),
    'the layers with the lowest block influence, scored once (ShortGPT)',
    paper='2403.03853',
    programs=stream.programs_shortgpt,
  ),
  'sleb': Method(
    by_scores(ablation.sleb, passes=lambda num_remove: num_remove),
    'one layer after another, each time the one whose removal raises the loss least (SLEB)',
    paper='2402.09025',
    programs=ablation.programs_sleb,
  ),
  'uidl': Method(
    by_scores(stream.uidl),
    'the contiguous block with the smallest angular distance between its input and output at the last token (The '
    'Unreasonable Ineffectiveness of the Deeper Layers)',
    paper='2403.17887',
    nested=False,
    programs=stream.programs_uidl,
  ),
  'taylor': Method(
    by_scores(weights.taylor),
    'the layers with the lowest first-order Taylor importance, scored once (Shortened LLaMA)',
    paper='2402.02834',
    spared=_KEPT,
    programs=weights.programs_taylor,
  ),
  'ppl': Method(
    by_scores(ablation.ppl),
    'the layers whose individual removal raises perplexity least, scored once (Shortened LLaMA)',
    paper='2402.02834',
    spared=_KEPT,
    programs=ablation.programs_ppl,
  ),
  'cosine_block': Method(
    by_scores(stream.cosine_block),
    'the contiguous block with the highest cosine similarity between its input and output (LLM-Streamline)',
    paper='2403.19135',
    nested=False,
    programs=stream.programs_cosine_block,
  ),
  'magnitude': Method(
    by_scores(weights.magnitude),
    'the layers with the smallest sum of absolute weights (Shortened LLaMA)',
    paper='2402.02834',
    reads_text=False,
    reads=(),
  ),
  'random': Method(by_scores(order.random), 'layers drawn at random with --seed', reads_text=False, reads=()),
  'last': Method(
    by_scores(order.last),
    'the last layers except the final one (The Unreasonable Ineffectiveness of the Deeper Layers)',
    paper='2403.17887',
    nested=False,
    spared=(0, 1),
    reads_text=False,
    reads=(),
  ),
}

_AUTO = auto.method({name: _SCORING[name] for name in auto.PARTS})

METHODS: dict[str, Method] = {
  'auto': _AUTO,
  'swaps': swaps.method(_AUTO),
  'mask': Method(
    mask.choose,
    'the layers that a learned mask turns off, the same number in every training step (after E3-Pruner)',
    paper='2511.17205',
    nested=False,
    refuses=mask.why_not,
    programs=mask.programs,
    reads=mask.READS,
  ),
  'elder': Method(
    elder.choose,
    'the layers with the lowest learned gates (ELDeR)',
    paper='2505.18232',
    refuses=elder.why_not,
    programs=elder.programs,
    reads=elder.READS,
  ),
  **_SCORING,
  'laco': Method(
    laco.choose,
    'none; it merges layers into an earlier one instead (LaCo)',
    paper='2402.11187',
    nested=False,
    refuses=laco.why_not,
    programs=laco.programs,
    merges=True,
  ),
}


def find_method(name: str, setting: str = 'method') -> Method:
  """Returns the method called `name`, or the user's own if `name` is package.module:NAME. Raises InputError."""
  return find_entry(setting, name, METHODS, Method)


def check(name: str, settings, num_layers: int, num_remove: int):
  """Raises InputError if the method cannot choose `num_remove` layers."""
  if why := find_method(name).why_not(settings, num_layers, num_remove):
    raise InputError('method', name, why)


def choose(name: str, context: Context, num_remove: int) -> Choice:
  """Returns the layers that a method removes. If `num_remove` is 0, it scores nothing and returns an empty Choice.

  Raises:
    InputError: the method may not choose that many layers, or its scores are not finite.
  """
  if not num_remove:
    return Choice([])
  check(name, context.settings, context.model.num_layers, num_remove)
  choice = find_method(name).choose(context, num_remove)
  if not np.isfinite(choice.scores).all():
    raise InputError('method', name, 'some scores are not finite; check the weights, or use --dtype=float32.')
  return choice
