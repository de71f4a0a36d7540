"""Several processes as one run: the same result as one process, and one-sentence errors if they do not match."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from elder_jax.devices import hosts
from elder_jax.devices.hosts import Launch
from elder_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]


def environment(devices: int) -> dict:
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': str(ROOT),
  }


def start(flags: list[str], number: int, port: int, count: int = 2) -> subprocess.Popen:
  command = [sys.executable, '-m', 'elder_jax.main', *flags, f'--coordinator=localhost:{port}']
  command += [f'--num_processes={count}', f'--process_id={number}']
  return subprocess.Popen(command, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return free.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_same_result_as_one(tmp_path):
  layout = '2 processes × 2 devices, data 2 × tp 2'
  command = [sys.executable, '-m', 'benchmarks.meshes', f'--workdir={tmp_path}', f'--only="{layout}"']
  done = subprocess.run(command, env=environment(1), capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, (
    done.stdout + done.stderr + ''.join(p.read_text()[-3000:] for p in tmp_path.glob('*.log'))
  )
  assert f'| {layout} | the same |' in done.stdout
  report = json.loads(next(tmp_path.glob('2_processes*/report.json')).read_text())
  assert report['device'] == '4 × cpu, 2 process(es)'
  (lead,), (other,) = tmp_path.glob('2_processes*.log'), tmp_path.glob('2_processes*.logs/1.log')
  assert 'perplexity' in lead.read_text() and 'perplexity' not in other.read_text()  # only process 0 logs


@pytest.mark.slow
def test_all_processes_refuse_a_folder_that_is_not_shared(tiny, text, tmp_path):
  flags = [f'--model={tiny}', '--remove_layers=1', '--recipe=none', '--compare=']
  port = free_port()
  both = [start([*flags, f'--workdir={tmp_path / str(i)}'], i, port) for i in range(2)]
  for i, process in enumerate(both):
    errors = process.communicate()[1]
    assert process.returncode == 2, errors
    assert f'process {i}: --workdir=' in errors and 'is not shared: process 1 does not see' in errors


@pytest.mark.slow
def test_all_processes_report_bad_input(tmp_path):
  port = free_port()
  both = [start([f'--model={tmp_path / "missing"}', f'--workdir={tmp_path / "w"}'], i, port) for i in range(2)]
  for process in both:
    errors = process.communicate()[1]
    assert process.returncode == 2 and 'there is no such folder' in errors and 'Traceback' not in errors


@pytest.mark.parametrize(
  'launch, named',
  [
    (dict(coordinator='a:1'), '--num_processes'),
    (dict(num_processes=2), '--coordinator'),
    (dict(coordinator='a', num_processes=2, process_id=0), '--coordinator=a'),
    (dict(coordinator='a:1', num_processes=2, process_id=2), '--process_id=2'),
    (dict(coordinator='a:1', num_processes=2, process_id=0, distributed='off'), '--distributed=off'),
  ],
)
def test_inconsistent_flags_of_processes_are_refused(launch, named):
  with pytest.raises(InputError) as caught:
    Launch(**launch)
  assert named in caught.value.for_command()


def test_without_a_cluster_on_is_an_error_and_auto_is_one_process(monkeypatch):
  def nobody(*given):
    assert given == (None, None, None)
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', nobody)
  hosts.start(Launch())
  with pytest.raises(InputError, match='distributed=on'):
    hosts.start(Launch(distributed='on'))
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *given: pytest.fail('--distributed=off was ignored'))
  hosts.start(Launch(distributed='off'))


def test_broadcasts_in_one_process_return_their_argument():
  assert hosts.broadcast_json({'a': [1, None]}) == {'a': [1, None]} and hosts.is_leader()
  np.testing.assert_array_equal(hosts.broadcast(np.arange(3.0)), np.arange(3.0))
  assert hosts.leader_first(lambda: 3) == 3
