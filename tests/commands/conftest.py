"""How these tests run a command in their own process."""

import pytest

from elder_jax import commands
from elder_jax.commands.command import Command


@pytest.fixture
def command(capsys):
  """Runs a verb, or a Command: (exit status, stdout, stderr without progress)."""

  def run(what, *args):
    status = 0
    try:
      if isinstance(what, Command):
        what.main([str(a) for a in args])
      else:
        commands.run_verb(what, [str(a) for a in args])
    except SystemExit as e:
      status = e.code
    out, err = capsys.readouterr()
    return status, out, err

  return run
