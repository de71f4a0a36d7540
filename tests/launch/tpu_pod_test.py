"""launch/tpu_pod.sh and tpu_host.sh: the commands that they run, and each way pods and runs can end."""

import os
import shlex
import signal
import subprocess
import time

from launching import FLAGS
from launching import POD
from launching import REPO
from launching import commands
from launching import environment
from launching import launch
from launching import program
import pytest


def test_pod_dry_run():
  options = ['--spot', '--create-flag=--labels=a=b', '--delete']
  shown = commands(launch('tpu_pod.sh', '--dry-run', *POD, *options, '--', *FLAGS))
  describe, create, pack, copy, setup, run, delete = shown
  where = ['--project=my-project', '--zone=my-zone']
  queued = ['gcloud', 'compute', 'tpus', 'queued-resources']
  assert describe == [*queued, 'describe', 'my-pod', *where, '--format=value(state.state)']
  assert create == [
    *queued,
    'create',
    'my-pod',
    '--node-id=my-pod',
    *where,
    '--accelerator-type=v5p-128',
    '--runtime-version=v2-alpha-tpuv5',
    '--spot',
    '--labels=a=b',
    '--quiet',
  ]
  assert pack[0] == 'tar' and all((REPO / name).exists() for name in pack[pack.index('-C') + 2 :])
  assert copy[:5] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'scp'] and '--worker=all' in copy
  for command in (setup, run):
    assert command[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'my-pod'] and '--worker=all' in command
  on_host = next(arg for arg in setup if arg.startswith('--command=')).partition('=')[2]
  assert shlex.split(on_host)[-3:] == ['~/elder/src/launch/tpu_host.sh', 'setup', 'gs://my-bucket']
  on_host = next(arg for arg in run if arg.startswith('--command=')).partition('=')[2]
  assert shlex.split(on_host)[1:] == [
    '~/elder/src/launch/tpu_host.sh',
    'run',
    *FLAGS,
    '--workdir=/mnt/elder/runs/my-pod',
  ]
  assert delete == [*queued, 'delete', 'my-pod', *where, '--force', '--quiet']


def test_pod_from_the_environment():
  names = {f'ELDER_{o.partition("=")[0][2:].upper().replace("-", "_")}': o.partition('=')[2] for o in POD}
  workdir = '--workdir=/mnt/elder/mine'
  there = launch('tpu_pod.sh', '--dry-run', '--', *FLAGS, workdir, **names)
  here = launch('tpu_pod.sh', '--dry-run', *POD, '--', *FLAGS, workdir)
  assert here.returncode == 0 and there.stdout == here.stdout
  assert workdir in here.stdout and 'runs/my-pod' not in here.stdout


# Each describe prints the next line of $T/states, each run exits with the next line of $T/runs; the last line stays.
GCLOUD = r"""
next() { head -n 1 "$T/$1"; [[ $(wc -l <"$T/$1") == 1 ]] || sed -i 1d "$T/$1"; }
case "$*" in
  *describe*) state=$(next states)
    [[ $state == ABSENT || $state == DENIED ]] || { echo "$state"; exit; }
    [[ $state == ABSENT ]] && echo 'ERROR: NOT_FOUND: Resource not found' >&2 || echo 'ERROR: PERMISSION_DENIED: no' >&2
    exit 1 ;;
  *'tpu_host.sh run'*) echo run >>"$T/did"; exit "$(next runs)" ;;
  *'tpu_host.sh setup'*) echo setup >>"$T/did"; exit "$(next setups)" ;;
  *' create '*) echo create >>"$T/did" ;;
  *' delete '*) echo delete >>"$T/did" ;;
  *scp*) [[ -s $5 ]] || exit 9 ;;
esac
"""


@pytest.mark.parametrize(
  ('options', 'states', 'runs', 'setups', 'did', 'status'),
  [
    ([], 'ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE', '0', '0', 'create setup run', 0),
    (['--delete'], 'ACTIVE', '0', '0', 'setup run delete', 0),
    ([], 'ACTIVE', '75 0', '0', 'setup run run', 0),
    # Preempted: the connection is lost, and the pod disappears.
    ([], 'ACTIVE SUSPENDING SUSPENDED ABSENT ACTIVE', '255 0', '0', 'setup run delete create setup run', 0),
    ([], 'ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE', '1 0', '0', 'setup run delete create setup run', 0),
    ([], 'ACTIVE', '255 0', '0', 'setup run setup run', 0),  # only the connection was lost
    ([], 'ACTIVE', '2', '0', 'setup run', 2),
    (['--delete'], 'ACTIVE', '3', '0', 'setup run delete', 3),
    ([], 'ACTIVE', '1', '0', 'setup run run run', 1),
    (['--max-failures=1'], 'ACTIVE', '134', '0', 'setup run', 1),
    (
      [],
      'ACTIVE',
      '1 1 75 1 1 0',
      '0',
      'setup run run run run run run',
      0,
    ),  # a checkpoint resets the count of failures
    ([], 'ACTIVE', '0', '1', 'setup setup setup', 1),
    ([], 'ACTIVE', '0', '1 0', 'setup setup run', 0),
    ([], 'FAILED ABSENT ACTIVE', '0', '0', 'delete create setup run', 0),
    ([], 'DENIED', '0', '0', '', 1),
  ],
)
@pytest.mark.slow
def test_pod_loop(tmp_path, options, states, runs, setups, did, status):
  bin_ = tmp_path / 'bin'
  program(bin_, 'gcloud', GCLOUD)
  for name, lines in (('states', states), ('runs', runs), ('setups', setups), ('did', '')):
    (tmp_path / name).write_text(''.join(f'{line}\n' for line in lines.split()))
  env = dict(PATH=f'{bin_}:{os.environ["PATH"]}', T=str(tmp_path), ELDER_POLL_SECONDS='0', TMPDIR=str(tmp_path))
  result = launch('tpu_pod.sh', *POD, *options, '--', *FLAGS, **env)
  assert (result.returncode, (tmp_path / 'did').read_text().split()) == (status, did.split()), result.stderr
  assert not list(tmp_path.glob('tmp.*'))  # the scratch folder is gone
  if states == 'DENIED':
    assert 'PERMISSION_DENIED' in result.stderr
  elif '--delete' not in options:
    assert 'the pod still exists' in result.stderr


@pytest.mark.parametrize('worker', ['0', '1'])
@pytest.mark.slow
def test_a_run_on_a_host_survives_the_connection_and_can_be_watched_again(tmp_path, worker):
  home = tmp_path / 'home'
  (home / 'elder/src').mkdir(parents=True)
  (home / 'elder/venv').mkdir()
  body = (
    'printf "%s\\n" "$@" >>"$HOME/args"; echo begun; until [[ -e $HOME/go ]]; do sleep 0.1; done; echo ended; exit 75'
  )
  program(home / 'elder/venv/bin', 'python', body)
  program(tmp_path / 'bin', 'curl', f'echo >>"$HOME/asked"; echo {worker}')
  env = environment(HOME=str(home), PATH=f'{tmp_path}/bin:{os.environ["PATH"]}')
  command = ['bash', str(REPO / 'launch/tpu_host.sh'), 'run']

  def watch(times: int) -> subprocess.Popen:
    """Starts the script. Returns when it has requested its worker number, just before it watches the run."""
    process = subprocess.Popen([*command, *FLAGS], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (home / 'asked').exists() or len((home / 'asked').read_text()) < times:
      assert process.poll() is None
      time.sleep(0.05)
    return process

  first = watch(1)
  os.killpg(first.pid, signal.SIGKILL)  # a lost connection kills everything in its session
  first.communicate(timeout=30)
  other = subprocess.run([*command, '--other=1'], env=env, capture_output=True, text=True, timeout=30)
  assert other.returncode == 2 and 'another run is in progress' in other.stderr
  again = watch(2)
  (home / 'go').touch()
  shown = again.communicate(timeout=30)[0]
  assert (again.returncode, shown) == (75, 'begun\nended\n' if worker == '0' else '')
  assert (home / 'args').read_text().splitlines() == ['-m', 'elder_jax.main', *FLAGS]  # the run started once
