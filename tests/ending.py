"""Shared by the tests of commands: checks how a command ended."""


def one_sentence(ended, status: int, *parts):
  """Checks the exit status of a command, and that its last line is one sentence with all `parts`."""
  assert ended[0] == status, ended
  assert 'Traceback' not in ended[2] and ended[2].endswith('\n'), ended[2]
  *progress, last = ended[2].splitlines()
  assert all(line.startswith('elder_jax: loading') for line in progress), ended[2]
  assert last.startswith('elder_jax: ') and len(last) < 1100, last
  for part in parts:
    assert part in last, last
