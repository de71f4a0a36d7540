"""SIGTERM and Ctrl-C: a run is saved, and the same command resumes it, also on fewer devices.

As a script, this file is a run that sends itself a signal.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys

import chex
import pytest
from tiny import names
from tiny import slow
from whole_runs import left_behind
from whole_runs import whole_run

from elder_jax.commands import run_verb
from elder_jax.devices import preemption
from elder_jax.errors import CTRL_C
from elder_jax.errors import as_text
from elder_jax.hf import safetensors_files
from elder_jax.hf import save as save_module
from elder_jax.hf.load import check_finite
from elder_jax.run import work as work_module
from elder_jax.training.batches import Batches

pytestmark = [
  # For damaged checkpoints, Orbax's threads may raise errors in a closed event loop after the test.
  pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'),
]


def in_a_process(settings, devices: int, batches: int, number=signal.SIGTERM) -> subprocess.CompletedProcess:
  """Runs `python -m elder_jax.main`, which sends itself a signal when it reads its n-th batch."""
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
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
  try:
    return subprocess.run([sys.executable, __file__, *args], env=env, capture_output=True, text=True)
  finally:
    signal.signal(signal.SIGINT, before)


def run_with_signal():
  """The script: an ordinary run that sends itself a signal."""
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
  # Each stage has 6 steps. The second process starts with the last step of stage 1.
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
def test_sigterm_saves_and_the_run_resumes_exactly(settings, tmp_path, monkeypatch, stage, step):
  straight = whole_run(settings, workdir=str(tmp_path / 'straight'))
  seen, count = [], {'gates': 0, 'regularize': 4}[stage] + step + 1  # stage 1 has 4 steps

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
def test_ctrl_c_saves_and_the_run_resumes_exactly(settings, tmp_path):
  straight = whole_run(settings, workdir=str(tmp_path / 'straight'))
  done = in_a_process(settings, 1, batches=6, number=signal.SIGINT)
  assert done.returncode == CTRL_C == 130, done.stderr[-3000:]
  lines = done.stderr.splitlines()
  assert lines[-1] == 'elder_jax: stopped by Ctrl-C after step 2 of regularize; saved; rerun the same command to resume'
  assert 'elder_jax: stopping at the next step; press Ctrl-C again to abort at once' in lines
  assert 'Traceback' not in done.stderr
  mine, whole = left_behind(settings['workdir'], whole_run(settings)), left_behind(tmp_path / 'straight', straight)
  chex.assert_trees_all_equal(mine[1], whole[1])
  assert mine[0] == whole[0] and mine[2] == whole[2]


def test_a_second_ctrl_c_aborts_and_other_handlers_are_kept(monkeypatch, capfd):
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background process of a shell
    preemption.listen_to_ctrl_c()
    signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, found)


def test_sigterm_stops_a_copy_within_a_tensor(settings, monkeypatch):
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


def test_sigterm_outside_training_stops_at_the_next_batch(settings, monkeypatch):
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


if __name__ == '__main__':
  run_with_signal()
