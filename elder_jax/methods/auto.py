"""--method=auto: of the layers that several methods choose, those that the rest can best do without.

No one method chooses well for every model and depth. What tells them apart is the loss after `absorb`, on text that it
did not read: it ranks choices as training does, which the loss after bare removal does not (docs/decisions.md).
"""

from collections.abc import Callable
import dataclasses

import numpy as np

from elder_jax.devices import hosts
from elder_jax.errors import InputError
from elder_jax.methods import importance
from elder_jax.methods.importance import Batches
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.model.decoder import Spec
from elder_jax.recipes import absorb
from elder_jax.run.config import Config
from elder_jax.text import perplexity as perplexity_lib

# One that chooses a run of layers and two that choose single ones, and what part of the text they read: ppl runs half of
# the model for every layer, and chooses the same or nearly so by a quarter of the text (docs/decisions.md).
CANDIDATES = {'cosine_block': 1.0, 'taylor': 1.0, 'ppl': 0.25}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Layers to remove, in the order of `method`, and the mean LM loss per token that is left when they are absorbed."""

  method: str
  removed: list[int]
  loss: float


def methods(num_layers: int, num_remove: int) -> list[str]:
  """Those of CANDIDATES that have enough layers to choose from; cosine_block always has."""
  return [method for method in CANDIDATES if num_remove <= importance.num_candidates(method, num_layers)]


def steps(config: Config) -> int:
  """Batches to choose and absorb by, the first of the training text; as many more are held out to judge by.

  Training reads the held-out ones, too. That is fine: no figure is reported of them but the losses of the candidates,
  which all are judged before any is trained.

  Raises:
    InputError: one pass over the text does not have two batches.
  """
  one_pass = config.num_sequences // config.batch_size
  if one_pass < 2:
    raise InputError(
      f'--method=auto: judges by batches that no candidate was fitted on, but --num_sequences={config.num_sequences} and '
      f'--batch_size={config.batch_size} make only one; give more sequences, a smaller batch, or --method=cosine_block.'
    )
  return min(config.score_steps, one_pass // 2)


def absorbs(spec: Spec) -> bool:
  """Whether candidates are absorbed before they are judged; where that cannot be they are just removed."""
  return spec.block != 'post'  # see absorb.check


def judge(
  model: Decoder,
  choices: dict[str, list[int]],
  fit: Batches,
  held_out: Batches,
  mode: Mode,
  log: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
  """The candidates, the best first.

  Args:
    choices: {method: layers to remove}; what several methods choose is judged once, under the first one's name.
    fit: tokens [B, T] that `absorb` reads.
    held_out: tokens [B, T] that the loss is taken on.
    log: called with each candidate when it has been judged.
  """
  candidates: list[Candidate] = []
  for method, removed in choices.items():
    if any(set(removed) == set(other.removed) for other in candidates):
      continue
    pruned = absorb.absorb(model, removed, fit, mode) if absorbs(model.spec) else pruning.prune(model, removed)
    candidates.append(Candidate(method, removed, _loss(pruned, held_out, mode)))
    log(candidates[-1])
  if not np.isfinite([candidate.loss for candidate in candidates]).all():
    raise InputError('--method=auto: some losses are not finite; look at the weights, or use --dtype=float32.')
  return sorted(candidates, key=lambda candidate: candidate.loss)


def _loss(model: Decoder, batches: Batches, mode: Mode) -> float:
  total, count = 0.0, 0.0
  for tokens_BT in batches:
    nll, n = map(hosts.to_host, perplexity_lib.nll(model, tokens_BT, None, mode))
    total, count = total + float(nll), count + float(n)
  return total / count
