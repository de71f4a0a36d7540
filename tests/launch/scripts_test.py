"""All scripts of launch/: lint, help, and bad arguments, which they refuse in one sentence."""

import re
import shutil
import subprocess

from launching import FLAGS
from launching import JOBSET
from launching import POD
from launching import REPO
from launching import SLURM
from launching import launch
from launching import tool
import pytest

SCRIPTS = sorted((REPO / 'launch').glob('*.sh'))


def test_shellcheck():
  result = subprocess.run([tool('shellcheck'), '-x', *SCRIPTS], cwd=REPO, capture_output=True, text=True)
  assert len(SCRIPTS) == 6 and result.returncode == 0, result.stdout


@pytest.mark.parametrize('script', ['gke_jobset.sh', 'local.sh', 'slurm.sh', 'tpu_pod.sh'])
def test_help(script):
  result = launch(script, '--help')
  assert result.returncode == 0 and f'launch/{script} [--dry-run]' in result.stdout and 'set -' not in result.stdout
  named = set(re.findall(r'^ +(--[a-z-]+)[=)]', (REPO / 'launch' / script).read_text(), re.MULTILINE))
  assert not [option for option in named if option not in result.stdout]


def test_scripts_name_no_project_or_address():
  """The scripts do not contain a zone, bucket or IP address."""
  for path in SCRIPTS:
    code = '\n'.join(line for line in path.read_text().splitlines() if not line.lstrip().startswith('#'))
    assert not re.search(r'(us|europe|asia)-[a-z]+\d|gs://[a-z]|\d+\.\d+\.\d+\.\d+', code.replace('127.0.0.1', '')), (
      path
    )


@pytest.mark.parametrize(
  ('script', 'args', 'part'),
  [
    ('local.sh', [], 'the number of processes is missing'),
    ('local.sh', ['--flagfile=x'], "'--flagfile=x' is not a number of processes"),
    ('local.sh', ['0'], "'0' is not a number of processes"),
    ('slurm.sh', [], '--nodes is missing'),
    ('slurm.sh', [*SLURM[:1], *SLURM[2:], '--', *FLAGS], '--gpus-per-node is missing'),
    ('slurm.sh', [*SLURM[:2], '--', *FLAGS], '--time is missing'),
    ('slurm.sh', [*SLURM, '--nodes=two', '--', *FLAGS], '--nodes=two is not a whole number'),
    ('slurm.sh', SLURM, 'the flags of elder_jax are missing'),
    ('slurm.sh', [*SLURM, '--flagfile=x'], "'--flagfile=x' is unknown"),
    *(('tpu_pod.sh', [o for o in POD if o != out] + ['--', *FLAGS], out.partition('=')[0]) for out in POD),
    ('tpu_pod.sh', [*POD, '--nfs=10.0.0.2:/share', '--', *FLAGS], 'are both given'),
    ('tpu_pod.sh', [*POD, '--name=My_Pod', '--', *FLAGS], '--name=My_Pod must have'),
    ('tpu_pod.sh', [*POD[:-1], '--nfs=share', '--', *FLAGS], '--nfs=share must be IP:/SHARE'),
    ('tpu_pod.sh', POD, 'the flags of elder_jax are missing'),
    ('tpu_pod.sh', [*POD, '--', *FLAGS, '--workdir=runs/x'], '--workdir=runs/x is not on the storage'),
    ('tpu_pod.sh', [*POD, '--', *FLAGS, '--workdir', '/mnt/elder/x'], '--workdir=FOLDER in one word'),
    ('tpu_pod.sh', [*POD, '--', 'model'], "'model' is not a flag"),
    *(('gke_jobset.sh', [o for o in JOBSET if o != out] + ['--', *FLAGS], out.partition('=')[0]) for out in JOBSET),
    ('gke_jobset.sh', [*JOBSET, '--bucket=b', '--', *FLAGS], 'are both given'),
    ('gke_jobset.sh', [*JOBSET, '--topology=4', '--', *FLAGS], '--topology=4 must be'),
    ('gke_jobset.sh', [*JOBSET, '--chips-per-host=3', '--', *FLAGS], 'does not divide the 64 chips'),
    ('gke_jobset.sh', [*JOBSET, '--', *FLAGS, '--workdir=/tmp/x'], '--workdir=/tmp/x is not on the storage'),
    ('gke_jobset.sh', [*JOBSET, '--', '--prompt=a\nb'], 'control character'),
  ],
)
def test_bad_arguments(tmp_path, script, args, part):
  """One sentence, exit status 2, and no command has run: PATH has only the programs of the script itself."""
  for name in 'bash basename dirname sed'.split():
    (tmp_path / name).symlink_to(shutil.which(name))
  result = launch(script, *args, PATH=str(tmp_path))
  assert result.returncode == 2 and not result.stdout
  assert (
    re.fullmatch(rf'launch/{script}: [^\n]+ \(see launch/{script} --help\)\n', result.stderr) and part in result.stderr
  )


@pytest.mark.parametrize(
  ('script', 'args', 'missing'),
  [
    ('slurm.sh', SLURM, 'sbatch'),
    ('tpu_pod.sh', POD, 'gcloud'),
    ('gke_jobset.sh', JOBSET, 'kubectl'),
  ],
)
def test_a_missing_program_is_named(tmp_path, script, args, missing):
  for name in 'bash basename dirname sed'.split():
    (tmp_path / name).symlink_to(shutil.which(name))
  result = launch(script, *args, '--', *FLAGS, PATH=str(tmp_path))
  assert (result.returncode, result.stdout) == (2, '') and f'{missing} is not installed' in result.stderr
