"""What the tests of commands share: how one has ended."""


def one_sentence(ended, status: int, *parts):
  """The command ended with that status, and its last words are one sentence that holds all `parts`."""
  assert ended[0] == status, ended
  assert 'Traceback' not in ended[2] and ended[2].endswith('\n'), ended[2]
  *progress, last = ended[2].splitlines()
  assert all(line.startswith('elder_jax: loading') for line in progress), ended[2]
  assert last.startswith('elder_jax: ') and len(last) < 1100, last
  for part in parts:
    assert part in last, last
