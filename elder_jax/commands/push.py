"""`elder_jax push FOLDER --to=USER/NAME`: upload an exported folder to the hub."""

import dataclasses
import os

from elder_jax import errors
from elder_jax.commands.command import Command
from elder_jax.commands.command import fail
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import user_path
from elder_jax.hf.push import PushFailed
from elder_jax.hf.push import push
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class PushSettings(Settings):
  """The repository."""

  to: str = setting('', 'Repository on the hub, as USER/NAME; created if it does not exist.')
  private: bool = setting(False, 'Create the repository as private; an existing one must be private.')


def run(parsed: Parsed):
  settings = PushSettings(**parsed.settings)
  folder = user_path(parsed.operands[0])
  if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name too long
    raise InputError(f'{folder}: there is no such folder; check the path.')
  if not settings.to:
    raise InputError('to', '', 'is missing; give a repository, as in --to=USER/NAME.')
  try:
    address = push(folder, settings.to, settings.private)
  except PushFailed as e:
    fail(errors.FAILED, f'{folder}: was not uploaded to {settings.to}: {e}.')
  print(f'{folder}: uploaded to {address}')


COMMAND = Command(
  'push',
  'Check the files of an exported folder and upload them to the Hugging Face hub.',
  run,
  {'Where to': PushSettings},
  ('elder_jax push runs/mine/export --to=USER/NAME --private',),
  operand='FOLDER',
)
