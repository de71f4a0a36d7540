"""The status line of a run, on a terminal and elsewhere."""

import re

import pytest
from tiny import config_of
from tiny import stop_at_batch

from elder_jax import log as log_module
from elder_jax.log import RunLog
from elder_jax.log import log
from elder_jax.run import pipeline


@pytest.fixture
def clock(monkeypatch) -> list[float]:
  """The time in seconds, as a list of one element that a test may change."""
  now = [0.0]
  monkeypatch.setattr(log_module.time, 'monotonic', lambda: now[0])
  return now


@pytest.fixture
def run_log(tmp_path) -> RunLog:
  """In stage 3 of 7, with 7 minutes left after it."""
  run_log = RunLog(tmp_path / 'metrics.jsonl')
  run_log.begin_stage('3/7', 'absorb: removing 7 layers', lambda: 420.0)
  return run_log


def test_the_status_line(run_log, clock, capsys):
  clock[0] = 20.0
  progress = run_log.progress('training, absorb', tokens=1000)
  progress(1, 3000, 'loss 2.71')
  for done, clock[0] in ((2, 20.1), (81, 60.0)):  # the second line follows within ten seconds
    progress(done, 3000, 'loss 2.51  held-out 2.64')
  progress(3000, 3000, 'loss 2.40')
  assert capsys.readouterr().err.splitlines() == [
    'elder_jax: [3/7] training, absorb: 1/3000  loss 2.71',
    'elder_jax: [3/7] training, absorb: 81/3000  loss 2.51  held-out 2.64  2,000 tokens/s  24 min left (run: 31 min)',
    'elder_jax: [3/7] training, absorb: 3000/3000  loss 2.40  74,975 tokens/s',
  ]


def test_a_terminal_shows_one_line_that_other_lines_replace(run_log, clock, capsys, monkeypatch):
  monkeypatch.setattr(log_module.sys.stderr, 'isatty', lambda: True, raising=False)
  progress = run_log.progress('fitting')
  progress(1, 2)
  log('held-out loss')
  progress(2, 2)
  assert capsys.readouterr().err.replace('\r\033[K', '<clear>') == (
    '<clear>elder_jax: [3/7] fitting: 1/2<clear>elder_jax: held-out loss\n<clear>elder_jax: [3/7] fitting: 2/2\n'
  )


def test_a_resumed_training_reports_its_step_and_losses(settings, capsys, monkeypatch):
  settings |= dict(method='last', recipe='prune_then_train', compare=[], train_steps=5, eval_data=())
  settings |= dict(validate_every=2, validation_sequences=4)
  stop_at_batch(monkeypatch, 4, settings)
  capsys.readouterr()
  pipeline.run(config_of(**settings))
  err = capsys.readouterr().err
  step = re.search(r'^elder_jax: Resuming training at step (\d) of 5\.$', err, re.MULTILINE)
  assert step and 0 < int(step[1]) < 5, err
  line = r'training, prune_then_train: 5/5  loss \d\.\d\d  held-out \d\.\d\d  [\d,]+ tokens/s$'
  assert re.search(line, err, re.MULTILINE), err
