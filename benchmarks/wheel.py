"""From nothing to a pruned model: how long the installation of a wheel takes, and one command of it in an empty folder.

python -m benchmarks.wheel FOLDER      FOLDER: a Hugging Face folder; its layers 1 and 2 are removed
"""

import pathlib
import platform
import subprocess
import sys
import tempfile
import time

from elder_jax.devices.about import package_versions

ROOT = pathlib.Path(__file__).parents[1]


def timed(*command: str | pathlib.Path, folder: str) -> float:
  """Seconds of a command. Ends this process if it fails."""
  start = time.monotonic()
  done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'{command}:\n{done.stderr[-2000:]}')
  return time.monotonic() - start


def main(model: str):
  with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as empty:
    build = (sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', made, ROOT)
    timed(*build, folder=made)
    timed(sys.executable, '-m', 'venv', f'{made}/venv', folder=made)
    [wheel] = pathlib.Path(made).glob('*.whl')
    install = timed(f'{made}/venv/bin/pip', 'install', '--quiet', wheel, folder=empty)
    removal = ('--remove_layers=1-2', '--recipe=none', '--compare=')
    program = f'{made}/venv/bin/elder_jax'
    prune = timed(program, 'prune', f'--model={model}', '--workdir=pruned', *removal, folder=empty)
    timed(program, 'verify', 'pruned/export', folder=empty)
  print(f'installation of the wheel: {install:.0f} s; pruning {pathlib.Path(model).name}: {prune:.0f} s')
  print(f'{platform.processor() or platform.machine()}, {package_versions()}')


if __name__ == '__main__':
  main(str(pathlib.Path(sys.argv[1]).expanduser().resolve()))
