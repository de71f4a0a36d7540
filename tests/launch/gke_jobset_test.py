"""launch/gke_jobset.sh: its manifest against the schemas, and the command that a pod runs."""

import os
import re
import subprocess

from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
import kubernetes_validate
from launching import FLAGS
from launching import JOBSET
from launching import environment
from launching import launch
from launching import program
import pytest
import yaml


def manifest(*options: str) -> dict:
  result = launch('gke_jobset.sh', '--dry-run', *options)
  assert result.returncode == 0, result.stderr
  return yaml.safe_load(result.stdout)


def check_schema(made: dict):
  """Raises if the JobSet or the Job in it violates its schema, which includes unknown keys."""
  known = JobsetV1alpha2JobSet.from_dict(made)
  assert known.to_dict() == made  # the model drops unknown keys
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
  """Checks the command that the pod's shell starts, after Kubernetes expands $(NAME) and unescapes $$(NAME)."""
  made = manifest(*JOBSET, '--', *FLAGS, r'--prompt=back\slash: #no "comment"')
  container = made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]
  expanded = [
    re.sub(r'\$\$\(|\$\(', lambda found: '$(' if found[0] == '$$(' else 'EXPANDED', arg)
    for arg in container['command'] + container['args']
  ]
  assert container['command'][:2] == ['bash', '-c'] and expanded[2].startswith('ulimit -l ')
  program(tmp_path, 'python', 'printf "%s\\n" "$@"')
  expanded[2] = expanded[2].partition('; ')[2]  # only root can set the limit
  path = f'{tmp_path}:{os.environ["PATH"]}'
  result = subprocess.run(expanded, env=environment(PATH=path), capture_output=True, text=True)
  assert result.stdout.splitlines() == [
    '-m',
    'elder_jax.main',
    *FLAGS,
    r'--prompt=back\slash: #no "comment"',
    '--workdir=/mnt/elder/runs/my-run',
  ]


def test_schema_detects_mistakes():
  """The check of the manifest can fail."""
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
