"""launch/local.sh: the commands that it starts, and each way its processes can end."""

import re
import signal
import subprocess
import sys
import time

from launching import FLAGS
from launching import REPO
from launching import commands
from launching import environment
from launching import launch
from launching import program
import pytest


def test_local_dry_run():
  shown = commands(launch('local.sh', '--dry-run', '2', *FLAGS, DEVICES_PER_PROCESS='4', PYTHON=sys.executable))
  port = re.search(r'127\.0\.0\.1:(\d+)', ' '.join(shown[0])).group(1)
  for i, command in enumerate(shown):
    assert command == [
      'env',
      'JAX_PLATFORMS=cpu',
      'JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo',
      'XLA_FLAGS=--xla_force_host_platform_device_count=4',
      sys.executable,
      '-m',
      'elder_jax.main',
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={i}',
      *FLAGS,
    ]
  assert len(shown) == 2 and 1024 < int(port) < 65536


# A stand-in for the interpreter: process I runs the commands of ENDS after the Ith comma. No process ends before all have
# started, because the first to end may terminate the others.
INTERPRETER = r"""
for arg; do case $arg in --process_id=*) id=${arg#*=} ;; --num_processes=*) n=${arg#*=} ;; esac; done
echo "process $id: $JAX_PLATFORMS ${XLA_FLAGS:-}"
printf '%s\n' "$@" >"$ARGS/$id"
trap 'echo checkpoint $id; exit 75' TERM
[[ $id != 2 ]] || trap '' TERM
touch "$ARGS/there-$id"
for ((i = 0; i < n; i++)); do until [[ -e $ARGS/there-$i ]]; do sleep 0.05; done; done
IFS=, read -ra ends <<<"$ENDS"
forever() { touch "$ARGS/ready-$id"; while true; do sleep 0.1; done; }
eval "${ends[id]}"
"""


@pytest.fixture
def local(tmp_path):
  """The environment in which local.sh starts the stand-in above."""
  python = program(tmp_path / 'bin', 'python-for-test', INTERPRETER)
  return environment(PYTHON=str(python), ARGS=str(tmp_path), LOGS=str(tmp_path / 'logs'), GRACE='2')


@pytest.mark.parametrize(
  ('ends', 'status', 'least'),
  [
    ('exit 0,exit 0,exit 0', 0, 0),
    ('exit 2,exit 2,exit 2', 2, 0),
    ('exit 3,exit 3,exit 3', 3, 0),
    ('forever,sleep 0.3; exit 1,exit 0', 1, 0),  # terminates the others
    ('forever,kill -KILL $$,exit 0', 1, 0),
    ('exit 75,forever,exit 0', 75, 0),
    # Process 2 ignores SIGTERM: it is killed after GRACE.
    ('until [[ -e $ARGS/ready-2 ]]; do sleep 0.1; done; exit 75,exit 0,forever', 75, 2),
    ('exit 0,sleep 1; exit 0,exit 0', 0, 1),  # a success does not terminate the others
  ],
)
@pytest.mark.slow
def test_local_ends(local, tmp_path, ends, status, least):
  start, command = time.monotonic(), ['bash', 'launch/local.sh', '3', *FLAGS]
  result = subprocess.run(command, cwd=REPO, env=local | {'ENDS': ends}, capture_output=True, text=True, timeout=60)
  assert result.returncode == status and time.monotonic() - start >= least, result.stderr
  assert result.stdout.startswith('process 0: cpu') and 'process 1: cpu' not in result.stdout
  assert (tmp_path / 'logs/1.log').read_text().startswith('process 1: cpu')
  assert (tmp_path / '1').read_text().splitlines()[3:] == ['--num_processes=3', '--process_id=1', *FLAGS]


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_local_signal_reaches_all(local, tmp_path, sent):
  process = subprocess.Popen(
    ['bash', 'launch/local.sh', '2', *FLAGS], cwd=REPO, env=local | {'ENDS': 'forever,forever'}, stdout=subprocess.PIPE
  )
  while not all((tmp_path / f'ready-{i}').exists() for i in (0, 1)):
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(sent)
  assert 'checkpoint 0' in process.communicate(timeout=30)[0].decode() and process.returncode == 75
  assert 'checkpoint 1' in (tmp_path / 'logs/1.log').read_text()


@pytest.mark.slow
def test_local_prints_why_another_process_failed(local):
  result = subprocess.run(
    ['bash', 'launch/local.sh', '2', *FLAGS],
    cwd=REPO,
    env=local | {'ENDS': 'forever,echo what was wrong; exit 2'},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 2 and 'what was wrong' in result.stderr
