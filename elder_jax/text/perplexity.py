"""Perplexity: exp of the mean negative log-likelihood per token over non-overlapping windows."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from elder_jax.errors import InputError
from elder_jax.model.decoder import Decoder
from elder_jax.model.program import Program
from elder_jax.model.program import Shapes
from elder_jax.model.program import device_bytes
from elder_jax.model.spec import Mode
from elder_jax.text import data
from elder_jax.text.data import Corpus
from elder_jax.training import losses

PROTOCOL = 'elder_jax/ppl/1: documents joined by an empty line, windows without overlap, token level, rest dropped'


@dataclasses.dataclass(frozen=True)
class Windows:
  """The windows of one corpus."""

  tokens_NT: np.ndarray  # int32
  about: dict  # for the report: source, sha256, window, tokens, bos


def make_windows(corpus: Corpus, flag: str, window: int, max_tokens: int, bos: str, first: int | None) -> Windows:
  """Cuts a corpus into windows.

  Args:
    corpus: the tokenised text.
    flag: the setting named in errors.
    window: tokens per window.
    max_tokens: use only the first tokens of the corpus; 0: all.
    bos: --bos, for the report.
    first: the token that each window starts with, counted in its length; or None.

  Raises:
    InputError: the corpus is shorter than a window.
  """
  tokens_N = corpus.tokens_N[: max_tokens or None]
  tokens_NT = data.windows(tokens_N, window, first)
  count = len(tokens_NT)
  if not count:
    raise InputError(
      flag,
      corpus.source,
      f'has {len(tokens_N)} tokens, a window needs --eval_seq_len={window}; give a longer text or a smaller window.',
    )
  about = {
    'source': corpus.source,
    'sha256': corpus.sha256,
    'window': window,
    'windows': count,
    'tokens_predicted': count * (tokens_NT.shape[1] - 1),
    'bos': bos,
    'protocol': PROTOCOL,
  }
  return Windows(tokens_NT, about)


def perplexity(
  model: Decoder,
  windows: Windows,
  mode: Mode,
  batch_size: int,
  put: Callable = jax.numpy.asarray,
  progress: Callable[[int, int], None] = lambda done, of: None,
) -> float:
  """exp(Σ nll / number of predicted tokens), summed in float64, with the model's gates.

  Args:
    model: the model.
    windows: of `make_windows`.
    mode: of the computation.
    batch_size: windows per step.
    put: moves a host array to the devices (sharding.put_batch).
    progress: called with (windows done, windows in all).
  """
  rows_NT, total, count = windows.tokens_NT, 0.0, 0.0
  for i in range(0, len(rows_NT), batch_size):
    batch_BT = rows_NT[i : i + batch_size]
    counted_BT = np.ones((batch_size, rows_NT.shape[1]), np.float32)
    counted_BT[len(batch_BT) :] = 0  # the last batch is padded, so that one program serves all
    batch_BT = np.concatenate([batch_BT, np.repeat(batch_BT[:1], batch_size - len(batch_BT), 0)])
    nll, n = losses.batch_nll(model, put(batch_BT), put(counted_BT), mode)
    total, count = total + float(nll), count + float(n)
    progress(min(i + batch_size, len(rows_NT)), len(rows_NT))
  with np.errstate(over='ignore'):  # an overflow returns infinity
    return float(np.exp(total / count))


def program(shapes: Shapes, model: Decoder, name: str) -> Program:
  """The loss of a batch of windows, for the plan. No other model is in memory."""
  settings = shapes.settings.evaluation
  B, T = settings.eval_batch_size, settings.eval_seq_len
  args = model, shapes.batch(B, T), shapes.batch(B, T, 'float32'), shapes.mode
  flops = shapes.flops(model.num_layers, B * T, T)
  calls = -(-settings.eval_tokens // (B * T)) or 1
  return Program(
    f'evaluation, {name}', losses.batch_nll, args, flops, device_bytes(model), calls=calls * len(settings.eval_data)
  )
