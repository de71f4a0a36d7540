"""Runs commands in the process of the tests."""

import pytest

from elder_jax import commands
from elder_jax.commands.command import Command


@pytest.fixture
def command(capsys):
  """Returns a function that runs a verb or a Command and returns (exit status, stdout, stderr)."""

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
