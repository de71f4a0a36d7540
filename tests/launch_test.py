"""launch/ and the Dockerfile: lint, dry runs, refusals, the manifest against its schemas, and each way in which runs end.

Clouds and clusters are stood in for by programs named gcloud, srun, kubectl and the like, in a folder of the test.
"""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
import kubernetes_validate
import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted((REPO / 'launch').glob('*.sh'))
FLAGS = ['--flagfile=configs/llama70b.flags', "--train_data=it's a, b.txt", '--eval_data=x="$HOME" $(id) `id`']
POD = [
  '--project=my-project',
  '--zone=my-zone',
  '--name=my-pod',
  '--accelerator-type=v5p-128',
  '--runtime-version=v2-alpha-tpuv5',
  '--bucket=my-bucket',
]
JOBSET = [
  '--name=my-run',
  '--image=registry/elder_jax:tpu',
  '--accelerator=tpu-v5p-slice',
  '--topology=4x4x4',
  '--pvc=my-claim',
]
SLURM = ['--nodes=2', '--gpus-per-node=8', '--time=4:00:00']


def environment(**extra) -> dict:
  """This one without what the scripts read, so that tests do not depend on it."""
  ours = ('ELDER_', 'LOGS', 'GRACE', 'PYTHON', 'DEVICES_PER_PROCESS', 'JAX_', 'XLA_')
  return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | extra


def launch(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
  command = ['bash', f'launch/{script}', *args]
  return subprocess.run(command, cwd=REPO, env=environment(**env), capture_output=True, text=True, timeout=120)


def commands(result: subprocess.CompletedProcess) -> list[list[str]]:
  """The commands that a dry run shows, as a shell would read them."""
  assert result.returncode == 0, result.stderr
  return [shlex.split(line[2:]) for line in result.stdout.splitlines() if line.startswith('+ ')]


def tool(name: str) -> str:
  """A program that a package of the test extra brings."""
  found = shutil.which(name, path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']]))
  assert found, f'{name} is missing; install the test extra'
  return found


def program(folder: pathlib.Path, name: str, body: str) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\nset -u\n{body}\n')
  path.chmod(0o755)
  return path


def test_shellcheck():
  result = subprocess.run([tool('shellcheck'), '-x', *SCRIPTS], cwd=REPO, capture_output=True, text=True)
  assert len(SCRIPTS) == 6 and result.returncode == 0, result.stdout


@pytest.mark.parametrize('script', ['gke_jobset.sh', 'local.sh', 'slurm.sh', 'tpu_pod.sh'])
def test_help(script):
  result = launch(script, '--help')
  assert result.returncode == 0 and f'launch/{script} [--dry-run]' in result.stdout and 'set -' not in result.stdout
  named = set(re.findall(r'^ +(--[a-z-]+)[=)]', (REPO / 'launch' / script).read_text(), re.MULTILINE))
  assert not [option for option in named if option not in result.stdout]


def test_no_place_of_ours():
  """Nothing that names a project, zone, bucket or address stands in the scripts."""
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
    ('tpu_pod.sh', [*POD, '--name=My_Pod', '--', *FLAGS], '--name=My_Pod must be of'),
    ('tpu_pod.sh', [*POD[:-1], '--nfs=share', '--', *FLAGS], '--nfs=share must be IP:/SHARE'),
    ('tpu_pod.sh', POD, 'the flags of elder_jax are missing'),
    ('tpu_pod.sh', [*POD, '--', *FLAGS, '--workdir=runs/x'], '--workdir=runs/x is not on the storage'),
    ('tpu_pod.sh', [*POD, '--', *FLAGS, '--workdir', '/mnt/elder/x'], '--workdir=FOLDER in one word'),
    ('tpu_pod.sh', [*POD, '--', 'model'], "'model' is no flag"),
    *(('gke_jobset.sh', [o for o in JOBSET if o != out] + ['--', *FLAGS], out.partition('=')[0]) for out in JOBSET),
    ('gke_jobset.sh', [*JOBSET, '--bucket=b', '--', *FLAGS], 'are both given'),
    ('gke_jobset.sh', [*JOBSET, '--topology=4', '--', *FLAGS], '--topology=4 must be'),
    ('gke_jobset.sh', [*JOBSET, '--chips-per-host=3', '--', *FLAGS], 'does not divide the 64 chips'),
    ('gke_jobset.sh', [*JOBSET, '--', *FLAGS, '--workdir=/tmp/x'], '--workdir=/tmp/x is not on the storage'),
    ('gke_jobset.sh', [*JOBSET, '--', '--prompt=a\nb'], 'control character'),
  ],
)
def test_bad_arguments(tmp_path, script, args, part):
  """One sentence, exit status 2, and no command was run: there is none to be found but those of the script itself."""
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


# local.sh


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


# Stands where an interpreter would, to end as the test says: process I runs the words of ENDS after the Ith comma. None
# ends before all are there: the first to end may end the others.
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
  """What starts local.sh with the stand-in above, and its environment."""
  python = program(tmp_path / 'bin', 'python-for-test', INTERPRETER)
  return environment(PYTHON=str(python), ARGS=str(tmp_path), LOGS=str(tmp_path / 'logs'), GRACE='2')


@pytest.mark.parametrize(
  ('ends', 'status', 'least'),
  [
    ('exit 0,exit 0,exit 0', 0, 0),
    ('exit 2,exit 2,exit 2', 2, 0),
    ('exit 3,exit 3,exit 3', 3, 0),
    ('forever,sleep 0.3; exit 1,exit 0', 1, 0),  # ends the others
    ('forever,kill -KILL $$,exit 0', 1, 0),
    ('exit 75,forever,exit 0', 75, 0),
    # Process 2 does not hear: it is killed after GRACE.
    ('until [[ -e $ARGS/ready-2 ]]; do sleep 0.1; done; exit 75,exit 0,forever', 75, 2),
    ('exit 0,sleep 1; exit 0,exit 0', 0, 1),  # nothing is ended because of a success
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
def test_local_says_why_another_process_failed(local):
  result = subprocess.run(
    ['bash', 'launch/local.sh', '2', *FLAGS],
    cwd=REPO,
    env=local | {'ENDS': 'forever,echo what was wrong; exit 2'},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 2 and 'what was wrong' in result.stderr


# slurm.sh


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
  """The script as Slurm runs it, a copy elsewhere; sbatch hands it over."""
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


# tpu_pod.sh


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


# Each describe takes the next line of $T/states, the last one stays; each run ends with the next line of $T/runs.
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
    # Preempted: the connection is lost, and the pod goes.
    ([], 'ACTIVE SUSPENDING SUSPENDED ABSENT ACTIVE', '255 0', '0', 'setup run delete create setup run', 0),
    ([], 'ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE', '1 0', '0', 'setup run delete create setup run', 0),
    ([], 'ACTIVE', '255 0', '0', 'setup run setup run', 0),  # only the connection was lost
    ([], 'ACTIVE', '2', '0', 'setup run', 2),
    (['--delete'], 'ACTIVE', '3', '0', 'setup run delete', 3),
    ([], 'ACTIVE', '1', '0', 'setup run run run', 1),
    (['--max-failures=1'], 'ACTIVE', '134', '0', 'setup run', 1),
    ([], 'ACTIVE', '1 1 75 1 1 0', '0', 'setup run run run run run run', 0),  # a checkpoint is a new start
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
    assert 'the pod is still there' in result.stderr


@pytest.mark.parametrize('worker', ['0', '1'])
@pytest.mark.slow
def test_host_runs_apart_and_is_watched_again(tmp_path, worker):
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
    """Starts the script; returns when it has asked for its worker's number, just before it watches the run."""
    process = subprocess.Popen([*command, *FLAGS], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (home / 'asked').exists() or len((home / 'asked').read_text()) < times:
      assert process.poll() is None
      time.sleep(0.05)
    return process

  first = watch(1)
  os.killpg(first.pid, signal.SIGKILL)  # the connection is lost, with all that is not set apart from it
  first.communicate(timeout=30)
  other = subprocess.run([*command, '--other=1'], env=env, capture_output=True, text=True, timeout=30)
  assert other.returncode == 2 and 'another run is going on' in other.stderr
  again = watch(2)
  (home / 'go').touch()
  shown = again.communicate(timeout=30)[0]
  assert (again.returncode, shown) == (75, 'begun\nended\n' if worker == '0' else '')
  assert (home / 'args').read_text().splitlines() == ['-m', 'elder_jax.main', *FLAGS]  # it ran once


# gke_jobset.sh


def manifest(*options: str) -> dict:
  result = launch('gke_jobset.sh', '--dry-run', *options)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load(result.stdout)


def check_schema(made: dict):
  """Raises where the JobSet, or the Job in it, is not as its schema has it; a key that it does not know counts."""
  known = JobsetV1alpha2JobSet.from_dict(made)
  assert known.to_dict() == made  # the model drops what it does not know
  job = made['spec']['replicatedJobs'][0]['template']
  kubernetes_validate.validate(
    {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'hosts'}, **job},
    kubernetes_validate.latest_version(),
    strict=True,
  )


@pytest.mark.parametrize(
  'options',
  [
    JOBSET,
    [
      *JOBSET[:-1],
      '--bucket=gs://b',
      '--service-account=me',
      '--spot',
      '--max-restarts=5',
      '--grace=60',
      '--namespace=ns',
    ],
    [*JOBSET, '--topology=2x4', '--chips-per-host=8', '--accelerator=tpu-v5-lite-podslice'],
  ],
  ids=['claim', 'bucket', 'one-host'],
)
def test_manifest(options):
  made = manifest(*options, '--', *FLAGS)
  check_schema(made)
  given = dict(option[2:].split('=', 1) for option in options if '=' in option)
  spec, job = made['spec'], made['spec']['replicatedJobs'][0]['template']['spec']
  pod = job['template']['spec']
  container = pod['containers'][0]
  hosts, chips = {'4x4x4': (16, 4), '2x4': (1, 8)}[given['topology']]
  one_slice = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  assert made['metadata']['annotations'] == one_slice
  assert job['completionMode'] == 'Indexed' and (job['parallelism'], job['completions']) == (hosts, hosts)
  assert container['resources']['limits'] == {'google.com/tpu': chips} and job['backoffLimit'] == 0
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-accelerator'] == given['accelerator']
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == given['topology']
  assert ('cloud.google.com/gke-spot' in pod['nodeSelector']) == ('--spot' in options) == ('tolerations' in pod)
  assert spec['failurePolicy']['maxRestarts'] == int(given.get('max-restarts', 20))
  assert pod['terminationGracePeriodSeconds'] == int(given.get('grace', 300))
  rule = job['podFailurePolicy']['rules'][0]
  assert (rule['action'], rule['onExitCodes']['values']) == ('FailJob', [2, 3])
  assert rule['onExitCodes']['containerName'] == container['name']
  assert spec['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  assert [m['name'] for m in container['volumeMounts']] == [v['name'] for v in pod['volumes']]
  if 'bucket' in given:
    assert pod['volumes'][0]['csi']['volumeAttributes']['bucketName'] == 'b' and pod['serviceAccountName'] == 'me'
    assert job['template']['metadata']['annotations'] == {'gke-gcsfuse/volumes': 'true'}
  else:
    assert pod['volumes'][0]['persistentVolumeClaim'] == {'claimName': 'my-claim'}


@pytest.mark.slow
def test_manifest_runs_the_flags_as_given(tmp_path):
  """What the pod's shell starts, once Kubernetes has replaced $(NAME) and unmasked $$(NAME)."""
  made = manifest(*JOBSET, '--', *FLAGS, r'--prompt=back\slash: #no "comment"')
  container = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
  expanded = [
    re.sub(r'\$\$\(|\$\(', lambda found: '$(' if found[0] == '$$(' else 'EXPANDED', arg)
    for arg in container['command'] + container['args']
  ]
  assert container['command'][:2] == ['bash', '-c'] and expanded[2].startswith('ulimit -l ')
  program(tmp_path, 'python', 'printf "%s\\n" "$@"')
  expanded[2] = expanded[2].partition('; ')[2]  # the limit is root's to set
  path = f'{tmp_path}:{os.environ["PATH"]}'
  result = subprocess.run(expanded, env=environment(PATH=path), capture_output=True, text=True)
  assert result.stdout.splitlines() == [
    '-m',
    'elder_jax.main',
    *FLAGS,
    r'--prompt=back\slash: #no "comment"',
    '--workdir=/mnt/elder/runs/my-run',
  ]


def test_schema_sees_mistakes():
  """That the check of the manifest can fail."""
  made = manifest(*JOBSET, '--', *FLAGS)
  made['spec']['failurePolicy']['maxRestart'] = 3
  with pytest.raises(AssertionError):
    check_schema(made)
  made = manifest(*JOBSET, '--', *FLAGS)
  made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['nodeSelectors'] = {}
  with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
    check_schema(made)


@pytest.mark.slow
def test_jobset_is_created(tmp_path):
  program(tmp_path, 'kubectl', 'printf "%s\\n" "$@" >"$T/args"; cat >"$T/manifest"')
  env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', T=str(tmp_path))
  result = launch('gke_jobset.sh', *JOBSET, '--', *FLAGS, **env)
  assert result.returncode == 0 and (tmp_path / 'args').read_text().split() == ['create', '-f', '-']
  assert yaml.safe_load((tmp_path / 'manifest').read_text()) == manifest(*JOBSET, '--', *FLAGS)


# Dockerfile


def test_dockerfile():
  result = subprocess.run([tool('hadolint'), REPO / 'Dockerfile'], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
  text = (REPO / 'Dockerfile').read_text()
  lines = re.sub(r'\\\n', ' ', text).splitlines()
  ignored = (REPO / '.dockerignore').read_text().split()
  copied = [source for line in lines if line.startswith('COPY ') for source in line.split()[1:-1]]
  for source in copied:
    assert (REPO / source).exists() and f'!{source.split("/")[0]}' in ignored, source
  assert ignored[0] == '*' and {'elder_jax', 'configs', 'setup.py'} <= set(copied)
  users = [line.split()[1] for line in lines if line.startswith('USER ')]
  assert users and users[-1] not in ('root', '0')
  extras = [extra for line in lines if 'EXTRA: ' in line for extra in re.findall(r'EXTRA: (\w+), (\w+)', line)[0]]
  assert extras == ['tpu', 'cuda']
  for extra in extras:
    assert f"'{extra}': [" in (REPO / 'setup.py').read_text()
