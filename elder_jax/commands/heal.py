"""`elder_jax heal`: trains a pruned model."""

from elder_jax.commands import prune
from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import as_text
from elder_jax.log import log
from elder_jax.run.removal_settings import CHOOSING
from elder_jax.run.removal_settings import HOW_MUCH

_FIXED = {'recipe': 'heal', 'compare': (), 'remove_layers': ()}
_NOT_HERE = {*HOW_MUCH, 'rounds', *CHOOSING, *_FIXED}


def run(parsed: Parsed) -> int | None:
  given = dict(parsed.settings)
  if typed := sorted(_NOT_HERE & parsed.typed):
    raise InputError(typed[0], given[typed[0]], 'heal removes no layers; leave it out, or use elder_jax prune.')
  if dropped := sorted(_NOT_HERE & given.keys()):
    log(
      f'not used: {", ".join(f"--{name}={as_text(given.pop(name))}" for name in dropped)}, because heal removes no layers'
    )
  if given.get('teacher') and 'distill' not in given:
    given['distill'] = 0.5
  return prune.run_config(parsed, given | _FIXED)


COMMAND = Command(
  'heal',
  'Train a pruned model. With --teacher it is also distilled from the dense model (--distill=0.5).',
  run,
  prune.GROUPS,
  (
    'elder_jax heal --model=runs/mine/export --teacher=DENSE --workdir=runs/healed \\',
    '    --train_data=more.jsonl --train_tokens=20M --validate_every=100 --eval_data=news=news.txt',
  ),
  configs=True,
  hidden=('Which layers to remove, and how', 'Method elder', 'Method mask', 'Method swaps'),
)
