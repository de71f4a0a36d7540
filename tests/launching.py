"""Shared by the tests of launch/: starts its scripts. Fake programs replace the tools of clouds and clusters."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parent.parent
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
  """Returns the environment without variables that the scripts read, so that tests do not depend on them."""
  ours = ('ELDER_', 'LOGS', 'GRACE', 'PYTHON', 'DEVICES_PER_PROCESS', 'JAX_', 'XLA_')
  return {key: value for key, value in os.environ.items() if not key.startswith(ours)} | extra


def launch(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
  command = ['bash', f'launch/{script}', *args]
  return subprocess.run(command, cwd=REPO, env=environment(**env), capture_output=True, text=True, timeout=120)


def commands(result: subprocess.CompletedProcess) -> list[list[str]]:
  """Returns the commands that a dry run prints, split as by a shell."""
  assert result.returncode == 0, result.stderr
  return [shlex.split(line[2:]) for line in result.stdout.splitlines() if line.startswith('+ ')]


def tool(name: str) -> str:
  """Returns the path of a program from a package of the test extra."""
  found = shutil.which(name, path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']]))
  assert found, f'{name} is missing; install the test extra'
  return found


def program(folder: pathlib.Path, name: str, body: str) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  path = folder / name
  path.write_text(f'#!/usr/bin/env bash\nset -u\n{body}\n')
  path.chmod(0o755)
  return path
