"""How flags are parsed, on the command line and in flag files, and which are refused."""

import dataclasses

from ending import one_sentence
import pytest

from elder_jax.commands.command import Command
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class Flags(Settings):
  prompt: str = setting('', 'A text.')
  seed: int = setting(0, 'A number.')
  max_new_tokens: int = setting(64, 'Another.')
  cache: bool = setting(True, 'A boolean.')
  data: dict[str, str] = setting({}, 'Repeatable.')
  layers: tuple[int, ...] = setting((), 'Numbers.')


def parsed(command, *args):
  found = {}
  ended = command(Command('flags', 'Flags.', lambda parsed: found.update(parsed.settings), {'All': Flags}), *args)
  return ended if ended[0] else dataclasses.asdict(Flags(**found))


@pytest.mark.parametrize(
  'args, values',
  [
    (['--max-new-tokens=3'], dict(max_new_tokens=3)),
    (['-max_new_tokens', '3'], dict(max_new_tokens=3)),
    (['--prompt', '--seed=3'], dict(prompt='--seed=3', seed=0)),
    (['--prompt=a=b\n--seed=3'], dict(prompt='a=b\n--seed=3', seed=0)),
    (['--nocache'], dict(cache=False)),
    (['--no-cache'], dict(cache=False)),
    (['--cache', '--seed=1'], dict(cache=True, seed=1)),
    (['--seed=3', '--seed', '3'], dict(seed=3)),
    (['--data=a=x', '--data=b=y'], dict(data={'a': 'x', 'b': 'y'})),
    (['--data=a=x', '--data=', '--data=b=y'], dict(data={'b': 'y'})),
    (['--layers=3,12-14'], dict(layers=(3, 12, 13, 14))),
    (['--layers='], dict(layers=())),
    (['--flagfile={tmp}/windows.flags'], dict(prompt='é b', seed=5)),
    (['--flagfile', '{tmp}/windows.flags', '--seed=6'], dict(seed=6)),
    (['--seed=6', '--flagfile={tmp}/nested.flags'], dict(seed=5, max_new_tokens=2)),
    (['--undefok=later', '--later=1', '--seed=2'], dict(seed=2)),
  ],
)
def test_flags(command, tmp_path, args, values):
  (tmp_path / 'windows.flags').write_bytes('\ufeff# Windows\r\n\r\n--prompt=é b\r\n--seed=5\r\n'.encode())
  (tmp_path / 'nested.flags').write_text(f'--seed=4\n--max-new-tokens=2\n--flagfile={tmp_path}/windows.flags\n')
  found = parsed(command, *(arg.format(tmp=tmp_path) for arg in args))
  assert values.items() <= found.items()


@pytest.mark.parametrize(
  'args, parts',
  [
    (['--seed=1', '--prompt=a', '--seed=2'], ["--seed: is given twice, as '1' and '2'"]),
    (['--max_new_tokens=1', '--max-new-tokens', '2'], ['--max_new_tokens: is given twice']),
    (['--cache', '--nocache'], ["--cache: is given twice, as 'true' and 'false'"]),
    (['--flagfile={tmp}/twice.flags', '--seed=3'], ['--seed: is given twice in {tmp}/twice.flags']),
    (['--nocache=1'], ['--nocache=1 does not take an argument']),
    (['--flagfile={tmp}/utf16.flags'], ['--flagfile={tmp}/utf16.flags: is not a UTF-8 text file']),
    (['--flagfile={tmp}/nul.flags'], ['nul.flags: is not a UTF-8 text file']),
    (['--flagfile={tmp}/itself.flags'], ['itself.flags: includes itself']),
    (['--flagfile={tmp}'], ['--flagfile={tmp}: cannot be read']),
    (['--flagfile'], ['Missing value for flag --flagfile']),
    (['--promt=x'], ["'promt'", 'prompt']),
    (['--seed=1\n2'], ['--seed=1']),
    (['--layers=5-3'], ['--layers=5-3', 'not a range']),
    (['--data=a'], ['--data=a', 'name=source']),
    (['--seed=x'], ['--seed=x', 'whole numbers']),
  ],
)
def test_flags_that_are_refused(command, tmp_path, args, parts):
  (tmp_path / 'twice.flags').write_text('--seed=1\n--seed=2\n')
  (tmp_path / 'utf16.flags').write_bytes('\ufeff--seed=1\r\n'.encode('utf-16-le'))
  (tmp_path / 'nul.flags').write_bytes(b'--prompt=a\0b\n')
  (tmp_path / 'itself.flags').write_text(f'--flagfile={tmp_path}/./itself.flags\n')
  ended = parsed(command, *(arg.format(tmp=tmp_path) for arg in args))
  one_sentence(ended, 2, *(part.format(tmp=tmp_path) for part in parts))
