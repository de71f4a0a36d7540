"""Checkpoints and resume: exact in both stages, on fewer devices, after SIGTERM, damage and a full disk.

Run as a script, this file is a run that sends itself SIGTERM.
"""

import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusal import refused
import safetensors.numpy
from tiny import Endless
from tiny import config_of
from tiny import slow

from elder_jax.commands import prune
from elder_jax.commands import run_verb
from elder_jax.commands.flags import Parsed
from elder_jax.devices import preemption
from elder_jax.errors import CTRL_C
from elder_jax.errors import as_text
from elder_jax.errors import disk_is_full
from elder_jax.hf import safetensors_files
from elder_jax.hf import save as save_module
from elder_jax.hf.load import check_finite
from elder_jax.log import MetricsFile
from elder_jax.log import write_whole
from elder_jax.methods import elder
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.model.spec import Spec
from elder_jax.run import pipeline
from elder_jax.run import work as work_module
from elder_jax.training import checkpoints
from elder_jax.training.batches import Batches
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import TrainState
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask

pytestmark = [
  # Of damaged checkpoints Orbax's own threads may complain to an event loop that is closed, after the test is over.
  pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'),
]

SPEC = Spec(
  vocab_size=40,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=24,
  norm_eps=1e-5,
  tied=True,
  rope_freq_RH=((1.0, 0.1),),
)
L = 5
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (9, 4, 9), np.int32)
SETTINGS = elder.GateSettings(selection='iterative', steps=3, lr=0.02, lambda1=1e-4, protect_first=1, protect_last=1)


def state_at(step: int, scale: float = 1.0) -> TrainState:
  w = np.random.default_rng(0).normal(size=(64, 33)).astype(np.float32)  # large enough for a data file of its own
  return TrainState(jnp.int32(step), {'w': jnp.asarray(scale * w)}, {'mu': jnp.ones((2, 3))})


def checkpoints_of(folder, *steps) -> Checkpoints:
  """Checkpoints of `state_at` these steps, the weights scaled by the step."""
  checkpoints = Checkpoints(folder, 1, 100)
  for step in steps:
    checkpoints.save(state_at(step, step))
  checkpoints.wait()
  return checkpoints


def names(folder: pathlib.Path) -> list[str]:
  return sorted(p.name for p in folder.iterdir())


# ---- Checkpoints ----


def test_due_by_steps_and_at_the_end(tmp_path):
  def due(every):
    return [s for s in range(1, 8) if Checkpoints(tmp_path / 'c', every, 7).due(s)]

  assert due(2) == [2, 4, 6, 7] and due(0) == [7]


def test_due_by_time_since_the_last_one(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  checkpoints = Checkpoints(tmp_path / 'c', 0, 50, minutes=0.5)
  due = []
  for step in range(1, 9):
    now[0] += 12
    if checkpoints.due(step):
      due.append(step)
      checkpoints.save(state_at(step))
  checkpoints.wait()
  assert due == [3, 6]


@pytest.mark.parametrize('keep', [1, 3])
def test_the_last_ones_stay_and_nothing_else(tmp_path, keep):
  checkpoints = Checkpoints(tmp_path / 'a' / 'c', 1, 100, keep=keep)
  start = state_at(0)
  assert checkpoints.latest(start) is start
  for step in (2, 4, 6, 8, 10):
    checkpoints.save(state_at(step, step))
  checkpoints.wait()
  assert names(tmp_path / 'a' / 'c') == sorted(['10', '8', '6'][:keep])
  # What a killed run leaves: one that Orbax has not renamed yet, and one too many.
  (tmp_path / 'a' / 'c' / '12.orbax-checkpoint-tmp').mkdir()
  checkpoints_of(tmp_path / 'b', 9)
  (tmp_path / 'b' / '9').rename(tmp_path / 'a' / 'c' / '9')
  again = Checkpoints(tmp_path / 'a' / 'c', 1, 100, keep=keep)
  chex.assert_trees_all_equal(again.latest(start), state_at(10, 10))
  assert '12.orbax-checkpoint-tmp' not in names(tmp_path / 'a' / 'c')
  again.save(state_at(12))
  again.wait()
  assert names(tmp_path / 'a' / 'c') == sorted(['12', '10', '9'][:keep])
  again.clear()
  assert not (tmp_path / 'a' / 'c').exists()


def test_what_is_saved_is_the_state_that_was_given_though_it_is_donated(tmp_path):
  step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
  state = step(TrainState(jnp.int32(0), {'w': jnp.zeros((1000, 1000))}, {}))
  checkpoints = Checkpoints(tmp_path / 'c', 1, 9)
  for _ in range(3):
    checkpoints.save(state)
    for _ in range(5):
      state = step(state)
  checkpoints.wait()
  saved = checkpoints.latest(state)
  assert int(saved.step) == 11 and np.unique(saved.trained['w']).tolist() == [11.0]


def damage_content(file: pathlib.Path):
  """Other bytes of the same length, as a disk gives them that lies."""
  octets = bytearray(file.read_bytes())
  for i in range(len(octets) // 2, len(octets), 7):
    octets[i] ^= 0x55
  file.write_bytes(octets)


def data_files(folder: pathlib.Path, where: str = '*') -> list[pathlib.Path]:
  """The files that hold the arrays."""
  files = [p for p in folder.rglob(f'{where}/d/*') if p.is_file()]
  assert files
  return files


@pytest.mark.parametrize('where', [slow('state'), 'ocdbt.process_0'])
@pytest.mark.parametrize(
  'damage',
  [
    lambda file: os.truncate(file, file.stat().st_size // 2),
    lambda file: os.truncate(file, 0),
    damage_content,
    os.unlink,
  ],
  ids=['half', 'empty', 'changed', 'gone'],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage, where):
  checkpoints_of(tmp_path / 'gates', 3, 5)
  for file in data_files(tmp_path / 'gates' / '5', where):
    damage(file)
  restored = Checkpoints(tmp_path / 'gates', 1, 9).latest(state_at(0))
  chex.assert_trees_all_equal(restored, state_at(3, 3))
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and f'{tmp_path}/gates/5: this checkpoint cannot be read (' in lines[0]
  assert lines[0].endswith('going on from step 3') and len(lines[0]) < 500
  again = checkpoints_of(tmp_path / 'gates', 5)
  assert names(tmp_path / 'gates') == ['3', '5']
  chex.assert_trees_all_equal(again.latest(state_at(0)), state_at(5, 5))


def test_changed_values_that_can_be_read_are_seen(tmp_path, capsys):
  sums = checkpoints._sums
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints, '_sums', lambda leaves: sums([a.at[(0,) * a.ndim].add(1) for a in leaves]))
    checkpoints_of(tmp_path / 'c', 5)
  start = state_at(0)
  assert Checkpoints(tmp_path / 'c', 1, 9).latest(start) is start
  assert capsys.readouterr().err.endswith('its sums are not those of what was saved); c starts anew\n')


def test_all_checkpoints_damaged_is_a_new_start(tmp_path, capsys):
  checkpoints_of(tmp_path / 'regularize', 3, 5)
  for file in data_files(tmp_path / 'regularize'):
    os.truncate(file, 1)
  start = state_at(0)
  assert Checkpoints(tmp_path / 'regularize', 1, 9).latest(start) is start
  told = capsys.readouterr().err.splitlines()
  assert [line.rpartition('; ')[2] for line in told] == ['going on from step 3', 'regularize starts anew']


# ---- Stage 1 ----


@pytest.fixture(scope='module')
def gate_step():
  tx = make_optimizer(train_mask(random_model(), 'gates'), rate, 0.0, 1e9)
  return make_step(tx, Mode(), 1, rate)


def rate(step):
  return SETTINGS.lr + 0.0 * step


def random_model() -> Decoder:
  return Decoder(SPEC, L, jax.random.key(0))


class Killed(BaseException):
  pass


@pytest.mark.parametrize('every, death', [(1, 4), slow(2, 1), slow(2, 5), (3, 3), slow(3, 6), slow(3, 8), (0, 7)])
def test_stage_1_goes_on_exactly(tmp_path, monkeypatch, gate_step, every, death):
  """Death in a round, at its border, before any checkpoint; nine steps in three rounds."""
  monkeypatch.setattr(elder, 'make_step', lambda *_: gate_step)
  log, total = [], SETTINGS.steps * 3

  def dying(i):
    if i == death:
      raise Killed
    return BATCHES_SBT[i]

  def learn(batch, folder):
    log.clear()
    return elder.learn(
      random_model(),
      3,
      SETTINGS,
      Mode(),
      Endless(batch),
      lambda *row: log.append(row),
      Checkpoints(folder, every, total),
      clip=1e9,
    )

  straight = learn(lambda i: BATCHES_SBT[i], tmp_path / 'straight')
  whole = list(log)
  with pytest.raises(Killed):
    learn(dying, tmp_path / 'c')
  assert learn(lambda i: BATCHES_SBT[i], tmp_path / 'c') == straight
  first = death // every * every if every else 0
  chex.assert_trees_all_equal(log, whole[first:])
  # Finished and started again: the answer without a step.
  assert learn(lambda i: pytest.fail('a step was done again'), tmp_path / 'c') == straight and not log
  assert len(set(straight[0])) == 3 and np.shape(straight[1]) == (3, L)


# ---- Whole runs ----


def whole_run(settings, **more):
  return pipeline.run(config_of(**{**settings, **more}))


def left_behind(workdir, report) -> tuple:
  tensors = safetensors.numpy.load_file(pathlib.Path(workdir) / 'export' / 'model.safetensors')
  rows = [json.loads(line) for line in (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  lines = [{k: v for k, v in row.items() if k not in ('time', 'tokens_per_second')} for row in rows]
  return {k: v for k, v in report.items() if k not in ('seconds', 'device')}, tensors, lines


def in_a_process(settings, devices: int, batches: int, number=signal.SIGTERM) -> subprocess.CompletedProcess:
  """`python -m elder_jax.main` that is sent a signal when it takes its n-th batch."""
  args = [f'--{k}={as_text(v)}' for k, v in settings.items() if k != 'eval_data']
  args += [f'--eval_data={text}' for text in settings['eval_data']]
  env = os.environ | {
    'SIGNAL': str(int(number)),
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}',
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'PYTHONPATH': os.pathsep.join([*map(str, pathlib.Path(__file__).parents[1:3]), os.environ.get('PYTHONPATH', '')]),
    'BATCHES': str(batches),
  }
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in the background ignore it
  try:
    return subprocess.run([sys.executable, __file__, *args], env=env, capture_output=True, text=True)
  finally:
    signal.signal(signal.SIGINT, before)


def struck():
  """The script: an ordinary run, but for the signal."""
  left, batch = int(os.environ['BATCHES']), Batches.__getitem__

  def counting(self, i):
    nonlocal left
    left -= 1
    if not left:
      os.kill(os.getpid(), int(os.environ['SIGNAL']))
    return batch(self, i)

  Batches.__getitem__ = counting
  run_verb('prune')


@pytest.mark.slow
def test_from_8_devices_to_2_to_1_by_sigterm(settings, tmp_path):
  settings |= dict(gate_steps=3, train_steps=6, batch_size=8, num_sequences=16, eval_batch_size=8, checkpoint_every=100)
  straight = whole_run(settings, workdir=str(tmp_path / 'straight'))
  # 6 steps of stage 1, then as many of stage 2; the second process has one of stage 1 left.
  for devices, mesh, stage, step in [(8, '2,4,1', 'gates', 5), (2, '1,2,1', 'regularize', 4)]:
    done = in_a_process(settings | {'mesh': mesh}, devices, batches=5)
    assert done.returncode == preemption.PREEMPTED == 75, done.stderr[-3000:]
    sentence = f'stopped by SIGTERM after step {step} of {stage}; saved; rerun the same command to resume'
    assert done.stderr.splitlines()[-1] == f'elder_jax: {sentence}'
    assert not {'Traceback', 'Warning', 'Error'} & set(re.findall(r'\w+', done.stderr)), done.stderr
    assert names(pathlib.Path(settings['workdir']) / 'checkpoints' / stage) == [str(step)]
  report = whole_run(settings)
  mine, whole = left_behind(settings['workdir'], report), left_behind(tmp_path / 'straight', straight)
  assert mine[0]['order'] == whole[0]['order']
  chex.assert_trees_all_close(mine[0]['gates'], whole[0]['gates'], atol=1e-5)
  chex.assert_trees_all_close(mine[0]['ppl'], whole[0]['ppl'], rtol=1e-5)
  chex.assert_trees_all_close(mine[1], whole[1], atol=1e-5)
  assert [(l['stage'], l['step']) for l in mine[2]] == [(l['stage'], l['step']) for l in whole[2]]
  chex.assert_trees_all_close([l['loss'] for l in mine[2]], [l['loss'] for l in whole[2]], atol=1e-5)


@pytest.mark.parametrize('stage, step', [slow('gates', 1), ('gates', 3), ('regularize', 2)])
def test_sigterm_saves_and_the_run_goes_on_exactly(settings, tmp_path, monkeypatch, stage, step):
  straight = whole_run(settings, workdir=str(tmp_path / 'straight'))
  seen, count = [], {'gates': 0, 'regularize': 4}[stage] + step + 1  # 4 steps of stage 1 go before stage 2

  def batch(self, i):
    seen.append(i)
    monkeypatch.setattr(preemption, '_signalled', len(seen) == count)
    return run_batch(self, i)

  run_batch = Batches.__getitem__
  with monkeypatch.context() as patch:
    patch.setattr(Batches, '__getitem__', batch)
    with pytest.raises(preemption.Preempted, match=f'after step {step + 1} of {stage}; saved'):
      whole_run(settings)
  monkeypatch.setattr(preemption, '_signalled', False)
  assert len(seen) == count
  resumed = whole_run(settings)
  mine, whole = left_behind(settings['workdir'], resumed), left_behind(tmp_path / 'straight', straight)
  chex.assert_trees_all_equal(mine[1], whole[1])
  assert mine[0] == whole[0] and mine[2] == whole[2]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_exactly(settings, tmp_path):
  straight = whole_run(settings, workdir=str(tmp_path / 'straight'))
  done = in_a_process(settings, 1, batches=6, number=signal.SIGINT)
  assert done.returncode == CTRL_C == 130, done.stderr[-3000:]
  told = done.stderr.splitlines()
  assert told[-1] == 'elder_jax: stopped by Ctrl-C after step 2 of regularize; saved; rerun the same command to resume'
  assert 'elder_jax: stopping at the next step; press Ctrl-C again to abort at once' in told
  assert 'Traceback' not in done.stderr
  mine, whole = left_behind(settings['workdir'], whole_run(settings)), left_behind(tmp_path / 'straight', straight)
  chex.assert_trees_all_equal(mine[1], whole[1])
  assert mine[0] == whole[0] and mine[2] == whole[2]


def test_the_second_ctrl_c_aborts_and_a_program_of_its_own_keeps_its_signals(monkeypatch, capfd):
  found = signal.getsignal(signal.SIGINT)
  for name in ('_listens', '_signalled', '_by_ctrl_c'):
    monkeypatch.setattr(preemption, name, False)
  try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    preemption.listen_to_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(preemption, '_listens', True)
    preemption.listen_to_ctrl_c()
    signal.raise_signal(signal.SIGINT)
    assert preemption.reached() and 'press Ctrl-C again' in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what runs in the background
    preemption.listen_to_ctrl_c()
    signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, found)


def test_sigterm_ends_a_copy_within_a_tensor(settings, monkeypatch):
  settings |= dict(recipe='none', compare=(), num_remove=None, remove_layers='2', train_data='', eval_data=())
  monkeypatch.setattr(safetensors_files, 'PIECE', 1024)
  seen, finite = [], check_finite

  def count(*args, **kwargs):
    seen.append(1)
    monkeypatch.setattr(preemption, '_signalled', len(seen) == 3)
    return finite(*args, **kwargs)

  monkeypatch.setattr(save_module, 'check_finite', count)
  with pytest.raises(preemption.Preempted, match='rerun the same command to resume'):
    whole_run(settings)
  assert len(seen) == 3 and not (pathlib.Path(settings['workdir']) / 'export').exists()
  monkeypatch.setattr(preemption, '_signalled', False)
  assert whole_run(settings)['removed'] == [2]


def test_sigterm_outside_training_ends_the_run_at_the_next_batch(settings, monkeypatch):
  settings |= dict(eval_tokens=0, recipe='none')
  done, put = [], work_module.sharding.put_batch

  def counting(*args):
    done.append(1)
    monkeypatch.setattr(preemption, '_signalled', len(done) == 3)
    return put(*args)

  monkeypatch.setattr(work_module.sharding, 'put_batch', counting)
  with pytest.raises(preemption.Preempted, match='the stages that are finished are kept'):
    whole_run(settings)
  assert len(done) == 3


def test_a_run_with_other_settings_is_told_all_differences(settings, tiny, text, tmp_path, monkeypatch):
  settings |= dict(recipe='none', eval_data=(f'text={text}',), num_remove=None, remove_layers='2')
  whole_run(settings)
  message = refused(
    settings, '--lr=0.001, not 0.5', '--seed=0, not 7', '--compare=none, not ', lr=0.5, seed=7, compare=[]
  )
  assert message.count(', not ') == 3
  other = tmp_path / 'other.txt'
  other.write_text('a')
  refused(settings, f'--eval_data=text={text}, not text={other}', eval_data=(f'text={other}',))
  # Cadence, mesh and other ways to write a path are free.
  monkeypatch.chdir(tmp_path)

  def near(path):
    return os.path.relpath(path, tmp_path)

  free = dict(
    checkpoint_every=7,
    checkpoint_minutes=3.0,
    keep_checkpoints=5,
    mesh='1,-1,1',
    verify='auto',
    model=near(tiny),
    train_data=near(text),
    eval_data=(f'text={near(text)}',),
    workdir='work',
  )
  assert whole_run(settings, **free)['removed'] == [2]
  # A setting that the earlier run's version did not know had its default.
  record = pathlib.Path(settings['workdir']) / 'config.json'
  record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != 'distill'}))
  whole_run(settings)
  refused(settings, '--distill=0.0, not 0.5', distill=0.5)
  # Earlier versions wrote one number.
  record.write_text(json.dumps(json.loads(record.read_text()) | {'distill': 0.0}))
  whole_run(settings)


# ---- Full disks ----


def test_a_full_disk_is_told_from_other_failures():
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  try:
    raise ValueError('wrapped') from full
  except ValueError as e:
    assert disk_is_full(e)
  assert disk_is_full(full) and disk_is_full(OSError(errno.EDQUOT, 'quota'))
  assert disk_is_full(
    ValueError('RESOURCE_EXHAUSTED: Failed to write 83 bytes to file 20: No space left on device [os_e')
  )
  assert not disk_is_full(OSError(errno.EACCES, 'no')) and not disk_is_full(
    ValueError('RESOURCE_EXHAUSTED: out of memory')
  )


def test_a_full_disk_ends_the_command_in_one_sentence(settings, monkeypatch, capsys):
  def full(config):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(prune.series, 'run', full)
  monkeypatch.setattr(prune.hosts, 'start', lambda launch: None)
  monkeypatch.setattr(prune.preemption, 'listen', lambda: None)
  with pytest.raises(SystemExit) as caught:
    prune.run_config(Parsed({}, []), config_of(**settings).flat())
  told = capsys.readouterr().err
  assert caught.value.code == 1 and told.count('\n') == 1
  assert f'--workdir={settings["workdir"]}: the disk is full; free some space' in told


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
  path = tmp_path / 'metrics.jsonl'
  log = MetricsFile(path)
  for step in range(3):
    log.write('gates', step, {'loss': 1.0})
  before = path.read_text()

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space'):
      log.begin('gates', 1)
    with pytest.raises(OSError, match='No space'):
      write_whole(tmp_path / 'report.md', 'text')
  assert path.read_text() == before and not (tmp_path / 'report.md').exists()
  with path.open('a') as file:
    file.write('{"stage": "gates", "st')  # what a full disk leaves of a line
  log.begin('gates', 1)
  assert path.read_text() == before.splitlines()[0] + '\n'


def test_a_folder_in_which_a_run_had_only_begun_is_not_foreign(settings):
  work = pathlib.Path(settings['workdir'])
  work.mkdir()
  for name in ('.writable', 'config.json.partial', '.shared-1-2'):
    (work / name).touch()
  settings |= dict(recipe='none', num_remove=None, remove_layers='2', eval_data=())
  assert whole_run(settings)['removed'] == [2] and not {'.writable', 'config.json.partial'} & set(names(work))
  assert config_of(**settings).flat()['workdir'] == json.loads((work / 'config.json').read_text())['workdir']


if __name__ == '__main__':
  struck()
