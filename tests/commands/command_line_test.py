"""The command line: flags, flag files, and exit status 2 with one sentence and no traceback."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from tiny import config_of

from elder_jax.commands import prune
from elder_jax.commands import run_verb
from elder_jax.commands.flags import parse
from elder_jax.commands.prune import GROUPS
from elder_jax.run import unused
from elder_jax.run.config import PLACES
from elder_jax.run.config import Config
from elder_jax.run.removal_settings import HOW_MUCH

REPO = pathlib.Path(__file__).resolve().parents[2]


def config_from(*args) -> tuple[Config, str]:
  """Returns (the Config that the arguments of `prune` make, the note about overridden flags)."""
  parsed = parse(list(GROUPS.values()), list(args))
  return Config.of(**{name: value for name, value in parsed.settings.items() if name in PLACES}), parsed.note


@pytest.mark.parametrize(
  ('args', 'part'),
  [
    (['--gate=foo'], '--gate=foo: is not known'),
    (['--recipe=cook'], '--recipe=cook'),
    (['--seq_len=many'], '--seq_len=many'),
    (['--lambda1=much'], '--lambda1=much'),
    (['--shuffle=perhaps'], '--shuffle=perhaps'),
    (['--no_such_flag=1'], "'no_such_flag'"),
    (['--lambda=1'], "'lambda'"),
    (['--seq_len'], 'seq_len'),
    (['model/folder'], "'model/folder'"),
    (['--seq_len=4', '-'], "'-'"),
    (['--flagfile=no/such.flags'], 'no/such.flags'),
    (['--flagfile={tmp}'], '{tmp}'),
    (['--flagfile={tmp}/binary.flags'], '--flagfile'),
    (['--flagfile={tmp}/prose.flags'], "'seq_len"),
  ],
  ids=lambda v: '',
)
def test_command_line(capsys, tmp_path, args, part):
  (tmp_path / 'binary.flags').write_bytes(b'\x80\x81\xff')
  (tmp_path / 'prose.flags').write_text('seq_len=3\n')
  with pytest.raises(SystemExit) as caught:
    run_verb('prune', [arg.format(tmp=tmp_path) for arg in args])
  err = capsys.readouterr().err
  assert caught.value.code == 2 and part.format(tmp=tmp_path) in err
  in_parser = not part.startswith(('--gate', '--recipe'))  # the settings check choices, not the parser
  assert re.fullmatch(r'elder_jax: [^\n]+' + (r' \(see --help\)\n' if in_parser else r'\.\n'), err), err


def test_flags_after_the_flagfile_override_it(tmp_path):
  (tmp_path / 'a.flags').write_text('# A comment.\n--seq_len=7\n--lambda1=0.5\n--eval_data=a=a.txt\n--compare=none\n')
  config, _ = config_from('--seed=3', f'--flagfile={tmp_path}/a.flags', '--seq_len=9', '--compare=')
  assert (config.data.seq_len, config.gates.lambda1, config.data.seed, config.removal.compare) == (9, 0.5, 3, ())
  assert config.evaluation.eval_data == {'a': 'a.txt'} and config.recipes() == ['absorb_then_train']
  assert config.removal.remove_layers is None and config.removal.num_remove is None and config.data.batch_size == 4


@pytest.mark.parametrize('text, weights', [('0.5', (0.5,)), ('0.9:0.5', (0.9, 0.5)), ('0.9,0.5', (0.9, 0.5))])
def test_a_weight_may_have_a_start_and_an_end(tmp_path, text, weights):
  config, _ = config_from(f'--distill={text}')
  assert config.training.distill == weights
  (tmp_path / 'config.json').write_text(json.dumps(config.to_json()))
  assert config_from(f'--config={tmp_path}/config.json')[0] == config


def test_a_flag_file_includes_another_next_to_it(tmp_path):
  (tmp_path / 'a.flags').write_text('--flagfile=_shared.flags\n--seq_len=7\n')
  (tmp_path / '_shared.flags').write_text('--seq_len=5\n--batch_size=2\n')
  config, _ = config_from(f'--flagfile={tmp_path}/a.flags')
  assert (config.data.seq_len, config.data.batch_size) == (7, 2)


@pytest.mark.parametrize(
  'args, wins, expected',
  [
    (['--num_remove=7', '--ratio=0.1,0.2'], ('ratio', (0.1, 0.2)), 'not used: --num_remove=7,'),
    (['--ratio=0.1', '--num-remove=7'], ('num_remove', 7), 'not used: --ratio=0.1, because'),
    (['--num_remove=7', '--remove_layers='], ('remove_layers', ()), 'not used: --num_remove=7,'),
    (
      ['--num_remove=7', '--remove_layers=3,12-14'],
      ('remove_layers', (3, 12, 13, 14)),
      'not used: --num_remove=7, because',
    ),
    (['--num_remove=7', '--num_remove=5'], ('num_remove', 5), ''),
    ([], (None, None), ''),
  ],
  ids=lambda v: '',
)
def test_the_last_way_to_set_how_many_layers_wins(tmp_path, args, wins, expected):
  (tmp_path / 'a.flags').write_text('\n'.join(args[:1]))
  config, note = config_from(f'--flagfile={tmp_path}/a.flags', *args[1:])
  given = {name: getattr(config.removal, name) for name in HOW_MUCH if getattr(config.removal, name) is not None}
  assert given == ({wins[0]: wins[1]} if wins[0] else {})
  assert note.startswith(expected) and bool(note) == bool(expected)


@pytest.mark.parametrize(
  'settings, named',
  [
    (dict(remove_layers='3', method='elder'), '--method=elder'),
    (dict(gate='output', method='sleb'), '--gate=output'),
    (dict(lambda2=0.1), '--lambda2=0.1'),
    (dict(recipe='none', lr=0.1, train_data='a'), '--lr=0.1'),
    (dict(train_steps=0, distill=0.5), '--distill=0.5'),
    (dict(train_steps=0, distill_hidden=0.5), '--distill_hidden=0.5'),
    (dict(temperature=2.0), '--temperature=2.0'),
    (dict(decay_ratio=0.5), '--decay_ratio=0.5'),
    (dict(train_steps=0, lr_schedule='wsd'), '--lr_schedule=wsd'),
    (dict(tasks_dir='here', eval_tokens=5), '--eval_tokens=5'),
    (dict(task_limit=5), '--task_limit=5'),
    (dict(method='elder', score_steps=3), '--score_steps=3'),
  ],
  ids=str,
)
def test_an_unused_setting_is_named(settings, named):
  lines = unused.unused_settings(config_of(**settings))
  assert any(line.startswith('not used: ') and named in line for line in lines), lines
  every = dict(
    method='elder,sleb', recipe='regularize', eval_data=('a=a',), tasks='piqa', distill=0.5, lr_schedule='wsd'
  )
  changed = {name: value for name, value in settings.items() if name not in ('remove_layers', 'train_steps', *every)}
  assert unused.unused_settings(config_of(**every | changed)) == []


def test_an_empty_eval_data_drops_those_before_it():
  config, note = config_from('--eval_data=a=a.txt', '--eval_data=', '--eval_data=b=b.txt', '--eval_data=c=c.txt')
  assert config.evaluation.eval_data == {'b': 'b.txt', 'c': 'c.txt'}
  assert note == 'not used: --eval_data=a=a.txt, because later flags replace them'
  config, note = config_from('--eval_data=a=b', '--eval_data=a=a')
  assert config.evaluation.eval_data == {'a': 'a'} and '--eval_data=a=b' in note


def command(*args, cwd=REPO) -> subprocess.CompletedProcess:
  env = {**os.environ, 'PYTHONPATH': str(REPO), 'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1'}
  return subprocess.run(
    [sys.executable, '-m', 'elder_jax.main', *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
  )


@pytest.mark.parametrize(
  ('args', 'part'),
  [
    (['--no_such_flag=1'], "'no_such_flag'"),
    (['--model={tmp}/absent', '--workdir={tmp}/work'], '--model={tmp}/absent: there is no such folder'),
    (['--model=no-such-owner/no-such-model', '--workdir={tmp}/work'], '--model=no-such-owner/no-such-model'),
    (['--flagfile={tmp}/absent.flags'], '{tmp}/absent.flags'),
    (['--workdir={tmp}/work', 'model/folder'], "'model/folder'"),
  ],
  ids=['flag', 'folder', 'hub', 'flagfile', 'positional'],
)
@pytest.mark.slow
def test_exit_status_2_without_a_traceback(tmp_path, args, part):
  result = command(*(arg.format(tmp=tmp_path) for arg in args))
  assert result.returncode == 2 and 'Traceback' not in result.stderr + result.stdout
  last = result.stderr.splitlines()[-1]
  assert last.startswith('elder_jax: ') and part.format(tmp=tmp_path) in last


@pytest.mark.parametrize(
  'backend, processes, before, kept',
  [('gpu', 1, None, True), ('cpu', 1, None, False), ('tpu', 4, None, False), ('tpu', 1, 'mine', False)],
)
def test_compiled_programs_are_cached_on_accelerators(backend, processes, before, kept, monkeypatch, tmp_path):
  names = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size')
  found = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  try:
    jax.config.update(names[0], before)
    jax.config.update(names[1], -1)
    prune._keep_programs()
    expected = f'{tmp_path}/.cache/elder_jax/programs' if kept else before
    assert getattr(jax.config, names[0]) == expected
    assert (getattr(jax.config, names[1]) == 2**31) == kept
  finally:
    for name, value in found.items():
      jax.config.update(name, value)
