"""`elder_jax plan`: prints the memory and time that a run needs, before anything is loaded."""

from elder_jax.commands import prune
from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed


def run(parsed: Parsed) -> int | None:
  return prune.run_config(parsed, parsed.settings | {'plan': True})


COMMAND = Command(
  'plan',
  'Print memory per device, FLOPs and least time of every stage of a run. Exit status 3 if it does not fit.',
  run,
  prune.GROUPS,
  (
    'elder_jax plan --config=llama7b',
    'elder_jax plan --config=llama70b --topology=v5p:4x4x4   (needs no TPU, only pip install libtpu)',
  ),
  configs=True,
)
