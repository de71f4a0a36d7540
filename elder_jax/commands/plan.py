"""`elder_jax plan`: what a run would take of each device, before anything is loaded."""

from elder_jax.commands import prune
from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed


def run(parsed: Parsed) -> int | None:
  return prune.run_config(parsed, parsed.settings | {'plan': True})


COMMAND = Command(
  'plan',
  'Print bytes on each device, FLOPs and least time of every stage of a run. Exit status 3 where it does not fit.',
  run,
  prune.GROUPS,
  (
    'elder_jax plan --config=llama7b',
    'elder_jax plan --config=llama70b --topology=v5p:4x4x4   (TPUs that need not be there; pip install libtpu)',
  ),
  configs=True,
)
