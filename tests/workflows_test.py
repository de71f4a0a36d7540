"""Continuous integration and pre-commit: they call the Makefile, and agree with setup.py."""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))
TARGETS = set(re.findall(r'^([\w-]+):(?!=)', (ROOT / 'Makefile').read_text(), re.MULTILINE))
SETUP = (ROOT / 'setup.py').read_text()
PRE_COMMIT = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())


def jobs_of(path: pathlib.Path) -> dict:
  return yaml.safe_load(path.read_text())['jobs']


def is_target(command: str) -> bool:
  verb, *targets = command.split()
  return verb == 'make' and bool(targets) and set(targets) <= TARGETS


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.name)
def test_each_step_runs_a_target_of_the_makefile(path):
  for name, job in jobs_of(path).items():
    commands = [step['run'] for step in job['steps'] if 'run' in step]
    assert commands, name
    for command in commands:
      assert is_target(command), f'{name}: {command}'
    assert job['timeout-minutes'] <= 60, name


def test_ci_lints_tests_documents_and_builds():
  jobs = jobs_of(ROOT / '.github' / 'workflows' / 'ci.yml')
  ran = {step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step}
  assert {'make lint', 'make test', 'make docs', 'make wheel'} <= ran


def test_each_python_is_tested():
  listed = set(re.findall(r"'Programming Language :: Python :: (3\.\d+)'", SETUP))
  test = jobs_of(ROOT / '.github' / 'workflows' / 'ci.yml')['test']
  assert set(test['strategy']['matrix']['python']) == listed == {'3.11', '3.12'}
  given = [step['with']['python-version'] for step in test['steps'] if 'setup-python' in step.get('uses', '')]
  assert given == ['${{ matrix.python }}']


def test_pre_commit_runs_make_lint_and_the_ruff_of_setup_py():
  hooks = {hook['id']: hook for repo in PRE_COMMIT['repos'] for hook in repo['hooks']}
  assert hooks['lint']['entry'] == 'make lint' and is_target(hooks['lint']['entry']) and hooks['lint']['always_run']
  (bounds,) = re.findall(r"'(ruff[<>=][^']*)'", SETUP)
  for name in ('ruff-check', 'ruff-format'):
    assert hooks[name]['additional_dependencies'] == [bounds], name
