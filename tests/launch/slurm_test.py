"""launch/slurm.sh: what it submits, and when it requeues the job."""

import os

from launching import FLAGS
from launching import SLURM
from launching import commands
from launching import launch
from launching import program
import pytest


def test_slurm_dry_run():
  submit, run, requeue = commands(launch('slurm.sh', '--dry-run', *SLURM, '--sbatch=--partition=gpu', '--', *FLAGS))
  assert submit == [
    'sbatch',
    '--job-name=elder_jax',
    '--nodes=2',
    '--ntasks=16',
    '--ntasks-per-node=8',
    '--gpus-per-node=8',
    '--time=4:00:00',
    '--requeue',
    '--open-mode=append',
    '--signal=TERM@180',
    '--output=elder_jax-%j.log',
    '--partition=gpu',
    'launch/slurm.sh',
    '--in-job',
    *FLAGS,
  ]
  assert run == ['srun', '--kill-on-bad-exit=0', '--gpu-bind=none', 'python', '-m', 'elder_jax.main', *FLAGS]
  assert requeue == ['scontrol', 'requeue', '$SLURM_JOB_ID']


@pytest.mark.parametrize(('status', 'requeued'), [(0, False), (1, False), (2, False), (75, True)])
@pytest.mark.slow
def test_slurm_job(tmp_path, status, requeued):
  """Runs the script like Slurm: sbatch copies it, and runs the copy."""
  bin_ = tmp_path / 'bin'
  program(bin_, 'sbatch', 'while [[ $1 == -* ]]; do shift; done; cp "$1" "$T/job"; shift; exec bash "$T/job" "$@"')
  program(bin_, 'srun', f'printf "%s\\n" "$@" >"$T/srun"; exit {status}')
  program(bin_, 'scontrol', 'printf "%s\\n" "$@" >"$T/scontrol"')
  path = f'{bin_}:{os.environ["PATH"]}'
  result = launch('slurm.sh', *SLURM, '--', *FLAGS, PATH=path, T=str(tmp_path), SLURM_JOB_ID='42')
  assert result.returncode == status
  assert (tmp_path / 'srun').read_text().splitlines()[-len(FLAGS) :] == FLAGS
  assert (tmp_path / 'scontrol').exists() == requeued
  assert not requeued or (tmp_path / 'scontrol').read_text() == 'requeue\n42\n'
