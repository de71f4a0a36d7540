"""Measures the held-out loss during training and keeps the state with the lowest."""

from collections.abc import Callable
import json
import pathlib
import shutil

import jax
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import preemption
from elder_jax.log import write_json
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.training import losses
from elder_jax.training.batches import Batches
from elder_jax.training.checkpoints import Checkpoints
from elder_jax.training.step import TrainState
from elder_jax.training.step import combine


def held_out_loss(model: Decoder, batches: Batches, mode: Mode, alive_L: np.ndarray | None = None) -> float:
  """Mean of −log p(next token) over the tokens of one pass, in nats, summed in float64.

  Args:
    model: the model.
    batches: held-out rows.
    mode: of the computation.
    alive_L: bool, False for layers to skip; None: all layers run.

  Raises:
    Preempted: after a signal to stop.
  """
  total, count = 0.0, 0.0
  for i in range(len(batches)):
    preemption.check()
    nll, tokens = losses.batch_nll(model, batches[i], batches.weight_BT(i), mode, alive_L)
    total, count = total + float(nll), count + float(tokens)
  return total / max(1.0, count)


class Validation:
  """Measures the held-out loss at step 0, every `every` steps and at the last; saves the history and the best state.

  Attributes:
    history: [[step, loss], …].
  """

  def __init__(
    self,
    batches: Batches,
    every: int,
    mode: Mode,
    folder: pathlib.Path,
    keeps_best: bool = False,
    alive_L: np.ndarray | None = None,
    tell: Callable[[int, float], None] = lambda step, loss: None,
  ):
    """Prepares the measurements.

    Args:
      batches: held-out rows.
      every: steps between measurements; 0: only before the first step and after the last.
      mode: of the computation.
      folder: holds the history and the best state, for a run that resumes.
      keeps_best: save the state with the lowest loss.
      alive_L: see held_out_loss; for a model whose layers are removed after the training.
      tell: called with each step and its loss, to log them.
    """
    self._batches, self._every, self._mode, self._alive_L, self._tell = batches, every, mode, alive_L, tell
    self._folder, self._keeps_best = folder, keeps_best
    self._best = Checkpoints(folder / 'best', 0, 0, keep=1)
    self.history: list[list] = []

  def begin(self, state: TrainState, frozen: Decoder):
    """Starts or resumes at this state: drops later entries of the history; measures the loss if none remain."""
    step = int(state.step)
    self.history = [entry for entry in hosts.broadcast_json(read_history(self._folder)) if entry[0] <= step]
    if not self.history:
      self(state, frozen)

  def due(self, step: int, last: int) -> bool:
    return step == last or (self._every > 0 and step % self._every == 0)

  def __call__(self, state: TrainState, frozen: Decoder):
    step = int(state.step)
    if step in (entry[0] for entry in self.history):
      return
    loss = held_out_loss(combine(state.trained, frozen), self._batches, self._mode, self._alive_L)
    self._tell(step, loss)
    if self._keeps_best and loss < min((entry[1] for entry in self.history), default=np.inf):
      self._best.save(_without_optimizer(state))
      self._best.wait()
    self.history.append([step, loss])
    if hosts.is_leader():
      self._folder.mkdir(parents=True, exist_ok=True)
      write_json(self._folder / 'history.json', {'history': self.history})

  def best(self, state: TrainState) -> TrainState:
    """The state with the lowest loss, without optimiser state. Frees the arrays of `state`, unless that is the best.

    Raises:
      OSError: the best state cannot be read.
    """
    if min(self.history, key=lambda entry: entry[1])[0] == int(state.step):
      return state
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    jax.tree.map(lambda a: a.delete(), state)
    found = self._best.latest(_without_optimizer(shapes))
    if isinstance(found.step, jax.ShapeDtypeStruct):
      raise OSError(f'{self._folder / "best"}: the state with the lowest held-out loss cannot be read')
    return found


def _without_optimizer(state: TrainState) -> TrainState:
  return state._replace(opt_state=())


def read_history(folder: pathlib.Path) -> list[list]:
  """[[step, loss], …] of a training so far; empty if there is none."""
  try:
    return json.loads((folder / 'history.json').read_text(encoding='utf-8'))['history']
  except (OSError, ValueError, KeyError):
    return []


def clear(folder: pathlib.Path):
  """Deletes the history and the best state once the training is over."""
  if hosts.is_leader():
    shutil.rmtree(folder, ignore_errors=True)
