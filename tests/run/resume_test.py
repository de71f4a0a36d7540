"""A killed run resumes exactly in stage 1, and only with the same settings."""

import json
import os
import pathlib

import chex
import jax
import numpy as np
import pytest
from refusal import refused
from tiny import Endless
from tiny import config_of
from tiny import names
from tiny import slow
from tiny import tiny_spec
from whole_runs import whole_run

from elder_jax.methods import elder
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.optimizer import make_optimizer
from elder_jax.training.step import make_step
from elder_jax.training.step import train_mask

pytestmark = [
  # For damaged checkpoints, Orbax's threads may raise errors in a closed event loop after the test.
  pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning'),
]

SPEC = tiny_spec()
L = 5
BATCHES_SBT = np.random.default_rng(0).integers(0, SPEC.vocab_size, (9, 4, 9), np.int32)
SETTINGS = elder.GateSettings(selection='iterative', steps=3, lr=0.02, lambda1=1e-4, protect_first=1, protect_last=1)


@pytest.fixture(scope='module')
def gate_step():
  tx = make_optimizer(train_mask(random_model(), 'gates'), rate, 0.0, 1e9)
  return make_step(tx, Mode(), 1, rate)


def rate(step):
  return SETTINGS.lr + 0.0 * step


def random_model() -> Decoder:
  return Decoder(SPEC, L, jax.random.key(0))


class Killed(BaseException):
  pass


@pytest.mark.parametrize('every, death', [(1, 4), slow(2, 1), slow(2, 5), (3, 3), slow(3, 6), slow(3, 8), (0, 7)])
def test_stage_1_resumes_exactly(tmp_path, monkeypatch, gate_step, every, death):
  """Nine steps in three rounds. Killed within a round, between rounds, or before any checkpoint."""
  monkeypatch.setattr(elder, 'make_step', lambda *_: gate_step)
  log, total = [], SETTINGS.steps * 3

  def dying(i):
    if i == death:
      raise Killed
    return BATCHES_SBT[i]

  def learn(batch, folder):
    log.clear()
    return elder.learn(
      random_model(),
      3,
      SETTINGS,
      Mode(),
      Endless(batch),
      lambda *row: log.append(row),
      Checkpoints(folder, every, total),
      clip=1e9,
    )

  straight = learn(lambda i: BATCHES_SBT[i], tmp_path / 'straight')
  whole = list(log)
  with pytest.raises(Killed):
    learn(dying, tmp_path / 'c')
  assert learn(lambda i: BATCHES_SBT[i], tmp_path / 'c') == straight
  first = death // every * every if every else 0
  chex.assert_trees_all_equal(log, whole[first:])
  # When it is finished, a restart returns the result without a step.
  assert learn(lambda i: pytest.fail('a step was done again'), tmp_path / 'c') == straight and not log
  assert len(set(straight[0])) == 3 and np.shape(straight[1]) == (3, L)


def test_other_settings_are_refused_and_all_listed(settings, tiny, text, tmp_path, monkeypatch):
  settings |= dict(recipe='none', eval_data=(f'text={text}',), num_remove=None, remove_layers='2')
  whole_run(settings)
  message = refused(
    settings, '--lr=0.001, not 0.5', '--seed=0, not 7', '--compare=none, not ', lr=0.5, seed=7, compare=[]
  )
  assert message.count(', not ') == 3
  other = tmp_path / 'other.txt'
  other.write_text('a')
  refused(settings, f'--eval_data=text={text}, not text={other}', eval_data=(f'text={other}',))
  # Checkpoint intervals, mesh and the spelling of paths may change.
  monkeypatch.chdir(tmp_path)

  def near(path):
    return os.path.relpath(path, tmp_path)

  free = dict(
    checkpoint_every=7,
    checkpoint_minutes=3.0,
    keep_checkpoints=5,
    mesh='1,-1,1',
    verify='auto',
    model=near(tiny),
    train_data=near(text),
    eval_data=(f'text={near(text)}',),
    workdir='work',
  )
  assert whole_run(settings, **free)['removed'] == [2]
  # A setting that an earlier version did not have counts as its default.
  record = pathlib.Path(settings['workdir']) / 'config.json'
  record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != 'distill'}))
  whole_run(settings)
  refused(settings, '--distill=0.0, not 0.5', distill=0.5)
  # Earlier versions wrote a single number.
  record.write_text(json.dumps(json.loads(record.read_text()) | {'distill': 0.0}))
  whole_run(settings)


def test_a_folder_with_files_of_an_unclaimed_run_is_accepted(settings):
  work = pathlib.Path(settings['workdir'])
  work.mkdir()
  for name in ('.writable', 'config.json.partial', '.shared-1-2'):
    (work / name).touch()
  settings |= dict(recipe='none', num_remove=None, remove_layers='2', eval_data=())
  assert whole_run(settings)['removed'] == [2] and not {'.writable', 'config.json.partial'} & set(names(work))
  assert config_of(**settings).flat()['workdir'] == json.loads((work / 'config.json').read_text())['workdir']
