"""The Dockerfile: lint, and what it copies."""

import re
import subprocess

from launching import REPO
from launching import tool


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
