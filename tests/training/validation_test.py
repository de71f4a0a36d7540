"""Held-out losses during training: which rows they use, resuming, and the best state."""

import json
import pathlib

import numpy as np
import pytest
from tiny import config_of

import elder_jax as ej
from elder_jax.devices import preemption
from elder_jax.errors import InputError
from elder_jax.run import pipeline
from elder_jax.text import perplexity
from elder_jax.training import loop
from elder_jax.training import validation


def run(settings: dict, **more) -> dict:
  return pipeline.run(config_of(**{**settings, **more}))


@pytest.fixture
def settings(settings) -> dict:
  removed = dict(num_remove=None, remove_layers='2,3', compare=('absorb_then_train',), recipe='prune_then_train')
  return settings | removed | dict(train_steps=6, validate_every=2, validation_sequences=5, checkpoint_every=2)


def test_each_row_has_a_curve_and_the_dense_model_a_loss(settings):
  report = run(settings)
  tokens = 4 * 32
  for row in report['rows']:
    assert [entry[:2] for entry in row['held_out']] == [[step, step * tokens] for step in (0, 2, 4, 6)]
  start = {row['recipe']: row['held_out'][0][2] for row in report['rows']}
  assert report['held_out_loss'] > 0 and len(set(start.values())) == 2


def test_held_out_rows_are_never_trained_on(settings, monkeypatch):
  seen = {}
  once = validation.held_out_loss

  def spy(model, batches, *args):
    seen['rows'] = batches.rows[np.arange(len(batches.rows))]
    return once(model, batches, *args)

  monkeypatch.setattr(validation, 'held_out_loss', spy)
  steps = loop.run_steps

  def spy_steps(step_fn, state, fixed, count, batches, *args):
    seen['trained'] = batches.rows[np.arange(len(batches.rows))]
    return steps(step_fn, state, fixed, count, batches, *args)

  monkeypatch.setattr('elder_jax.training.trainer.run_steps', spy_steps)
  run(settings)
  assert seen['rows'].shape == (8, 32)  # 5, rounded up to whole batches
  assert not {row.tobytes() for row in seen['rows']} & {row.tobytes() for row in seen['trained']}


def test_the_loss_is_the_log_of_the_perplexity(settings, tiny):
  model = ej.load(str(tiny))
  batches = ej.batches(model, settings['train_data'], seq_len=32, num_sequences=8, batch_size=4)
  rows_NT = batches.rows[np.arange(8)]
  windows = perplexity.Windows(rows_NT, {})
  expected = np.log(perplexity.perplexity(model.decoder, windows, model.mode, 4))
  assert validation.held_out_loss(model.decoder, batches, model.mode) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_has_the_same_curve(settings, monkeypatch, tmp_path):
  whole = run(settings, workdir=str(tmp_path / 'whole'))
  calls = []

  def reached():
    calls.append(1)
    return len(calls) == 3  # after the third step, past the checkpoint of the second

  monkeypatch.setattr(preemption, 'reached', reached)
  with pytest.raises(preemption.Preempted):
    run(settings)
  monkeypatch.undo()
  assert [row['held_out'] for row in run(settings)['rows']] == [row['held_out'] for row in whole['rows']]


def test_the_best_state_is_exported(settings, monkeypatch):
  once, losses, batches = validation.held_out_loss, [], []

  def told(model, held_out, *args):
    """Replaces the losses of the dense model, of steps 0 to 4 and of the result; the lowest is at step 2."""
    losses.append(once(model, held_out, *args))
    batches.append(held_out)
    return [9.0, 5.0, 4.0, 1.0, 2.0, 3.0, 1.0][len(losses) - 1]

  monkeypatch.setattr(validation, 'held_out_loss', told)
  report = run(settings, train_steps=4, validate_every=1, compare=(), export='best')
  assert [entry[2] for entry in report['rows'][-1]['held_out']] == [5.0, 4.0, 1.0, 2.0, 3.0]
  exported = ej.load(f'{settings["workdir"]}/export')
  assert once(exported.decoder, batches[0], exported.mode) == pytest.approx(losses[3], rel=1e-5)
  assert losses[6] == losses[3] != pytest.approx(losses[5], rel=1e-3)
  lines = (pathlib.Path(settings['workdir']) / 'metrics.jsonl').read_text().splitlines()
  told = [row['held_out_loss'] for row in map(json.loads, lines) if row['stage'].endswith('.held_out')]
  assert told == [5.0, 4.0, 1.0, 2.0, 3.0]


def test_export_best_needs_held_out_losses(settings):
  with pytest.raises(InputError, match='export=best.*--validate_every'):
    run(settings, validate_every=0, export='best')
