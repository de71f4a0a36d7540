"""Adapts a Decoder to lm-evaluation-harness (0.4.x). Needs no torch; scores agree with the harness's `hf` backend.

This module imports the package lm_eval. Import it through zero_shot.py, which raises InputError if lm_eval is missing.

Dimension names: see model/decoder.py. c is a chunk of the sequence.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from lm_eval import utils as harness
from lm_eval.api.model import TemplateLM
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import sharding
from elder_jax.errors import InputError
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import head_of
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Mode
from elder_jax.text.decoding import Sampling
from elder_jax.text.generation import generate
from elder_jax.training import losses

MAX_GEN_TOKS = 256  # default of generation tasks, as in the hf backend
# Options that a generation task may set. Others are refused, not ignored.
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
_NEUTRAL = {'num_beams': 1, 'repetition_penalty': 1.0, 'min_p': 0.0, 'typical_p': 1.0}


@functools.partial(jax.jit, static_argnames='mode')
def token_scores(model: Decoder, tokens_BT, position_BT, target_BT, mode: Mode):
  """log p(target) at some positions, float32 [B, T], and whether target is the most probable token, bool [B, T].

  Works through the positions in chunks: logits [B, T, V] are never in memory, and nothing of size V leaves the devices.

  Args:
    tokens_BT: int32.
    position_BT, target_BT: int32; target_BT[b, i] is scored as the token after tokens_BT[b, : position_BT[b, i] + 1].
      There may be fewer of them than tokens.
  """
  x_BTD, _ = forward(model, tokens_BT, mode=mode)
  x_BTD = sharding.constrain_batch(jnp.take_along_axis(x_BTD, position_BT[..., None], 1))
  B, T = target_BT.shape
  chunk, head = losses.chunk_length(B, T), head_of(model)

  def as_chunks(a):
    return jnp.moveaxis(
      jnp.pad(a, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (a.ndim - 2)).reshape(B, -1, chunk, *a.shape[2:]), 1, 0
    )

  def score(xs):
    x_BcD, target_Bc = xs
    logits_BcV = logits_of(model, x_BcD, head)
    chosen_Bc = jnp.take_along_axis(logits_BcV, target_Bc[..., None], -1)[..., 0]
    return chosen_Bc - jax.nn.logsumexp(logits_BcV, -1), jnp.argmax(logits_BcV, -1) == target_Bc

  def whole(a):
    return jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T]

  return sharding.replicate(jax.tree.map(whole, jax.lax.map(score, (as_chunks(x_BTD), as_chunks(target_BT)))))


def bucket(length: int) -> int:
  """The padded length of a batch: four lengths per power of two, so that few programs are compiled."""
  step = max(32, (1 << length.bit_length()) // 8)
  return -(-length // step) * step


def _check_finite(requests, scores: list[float]):
  for request, score in zip(requests, scores):
    if not math.isfinite(score):
      task = getattr(request, 'task_name', None) or 'a task'
      raise InputError(
        f'{task}: the model returns {score} as the log-probability of a text, so its answers are meaningless; check the '
        'weights, or use --dtype=float32.'
      )


class JaxLM(TemplateLM):
  """A Decoder behind the harness's model interface. Every process of a run makes one; all return the same answers.

  Args:
    model: the model.
    tokenizer: a tokenizer of transformers.
    mode: of the computation. Scoring uses the model's gates; in generation gates are 1.
    batch_size: rows per step; the last batch is padded to it.
    max_length: tokens of the model's context; longer requests are truncated on the left.
    put: moves a host array to the devices (sharding.put_batch).
    eos_ids: tokens that end a generated text in addition to the tokenizer's own (generation.eos_ids).
    progress: called with (requests done, requests in all) while scoring.

  Raises:
    InputError: a request cannot be answered, or the tokenizer has neither a BOS nor an EOS token.
  """

  def __init__(
    self,
    model: Decoder,
    tokenizer,
    mode: Mode = Mode(),
    batch_size: int = 16,
    max_length: int = 2048,
    put: Callable = jnp.asarray,
    eos_ids: tuple[int, ...] = (),
    progress: Callable[[int, int], None] = lambda done, of: None,
  ):
    super().__init__()
    self.model, self.tokenizer, self.mode, self.batch_size = model, tokenizer, mode, batch_size
    # config.json may omit the context length; the spec then has the family's default.
    self.max_length = min(max_length, model.spec.most_positions or max_length)
    self.put, self.eos_ids, self.progress = put, eos_ids, progress
    if self.prefix_token_id is None:
      raise InputError('the tokenizer has neither a BOS nor an EOS token; give another with --tokenizer.')

  @property
  def eot_token_id(self):
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self):
    """The token that stands in for an empty context."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Token ids. The tokenizer adds its special tokens, unless the text already starts with the prefix token."""
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    answers = super().loglikelihood(requests, disable_tqdm=True)  # `progress` reports instead
    _check_finite(requests, [logp for logp, _ in answers])
    return answers

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # ty: ignore[incompatible-method-override]
    """Scores requests ((texts), context tokens, continuation tokens).

    Returns:
      Per request: (sum of log p over the continuation, whether greedy decoding generates it).
    """
    numbers: dict[tuple[int, ...], list[int]] = {}  # row -> its requests; equal rows run once
    for i, (texts, context, continuation) in enumerate(requests):
      if not context or not 0 < len(continuation) <= self.max_length:
        raise InputError(
          f'a task requests {texts}: {len(continuation)} tokens after a context of {len(context)}; correct the task, which '
          f'needs a context and 1 to {self.max_length} tokens after it.'
        )
      numbers.setdefault(tuple((context + continuation)[-(self.max_length + 1) :]), []).append(i)
    rows = sorted(numbers, key=lambda row: (-len(row), row))
    if rows and (largest := max(map(max, rows))) >= self.model.spec.vocab_size:
      raise InputError(
        f'the tokenizer made token {largest}, but the model has {self.model.spec.vocab_size} tokens; use the tokenizer '
        'of the model.'
      )

    answers, done = [(0.0, True)] * len(requests), 0
    for start in range(0, len(rows), self.batch_size):
      batch = rows[start : start + self.batch_size]
      logp_BT, greedy_BT = self._score(batch, max(len(requests[i][2]) for row in batch for i in numbers[row]))
      for row, logp_T, greedy_T in zip(batch, logp_BT, greedy_BT):
        for i in numbers[row]:
          texts, _, continuation = requests[i]
          scored = slice(len(logp_T) - len(continuation), None)
          answers[i] = (float(logp_T[scored].sum(dtype=np.float64)), bool(greedy_T[scored].all()))
          if texts is not None:  # None: a window of loglikelihood_rolling
            self.cache_hook.add_partial('loglikelihood', texts, answers[i])
        done += len(numbers[row])
      self.progress(done, len(requests))
    return answers

  def _score(self, rows, last: int) -> tuple[np.ndarray, np.ndarray]:
    """token_scores of the `last` tokens of each row or some more, on the host; the last token comes last.

    The longest row is the first. Causal masking hides the padding on its right.
    """
    length = min(self.max_length, bucket(len(rows[0]) - 1))
    scored = min(length, max(32, 1 << (last - 1).bit_length()))
    tokens_BT = np.zeros((self.batch_size, length), np.int32)
    position_BT, target_BT = (np.zeros((self.batch_size, scored), np.int32) for _ in 'pt')
    for i, row in enumerate(rows):
      tokens_BT[i, : len(row) - 1] = row[:-1]
      position_T = np.arange(len(row) - 1 - scored, len(row) - 1)
      position_BT[i] = np.maximum(position_T, 0)
      target_BT[i] = np.array(row)[position_BT[i] + 1]
    scores = token_scores(self.model, *map(self.put, (tokens_BT, position_BT, target_BT)), self.mode)
    return tuple(map(hosts.to_host, scores))

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """log p of whole texts. Texts longer than the context are split into windows that predict each token once."""
    windows, owner_W = [], []
    for i, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0])
      for window in harness.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
        windows.append((None, *harness.make_disjoint_window(window)))
        owner_W.append(i)
    totals = [0.0] * len(requests)
    for i, (logp, _) in zip(owner_W, self._loglikelihood_tokens(windows)):
      totals[i] += logp
    _check_finite(requests, totals)
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """The generated text after each context, up to the first of the request's `until` strings."""
    groups: dict[str, list[int]] = {}  # settings -> requests with them
    for i, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
    texts = [''] * len(requests)
    for numbers in groups.values():
      gen_kwargs = requests[numbers[0]].args[1]
      until, length, sampling = self._generation(gen_kwargs)
      room = self.max_length - length
      if room < 1:
        raise InputError(
          f'a task requests {length} new tokens, but the context of the model is {self.max_length}; lower the max_gen_toks '
          'of the task.'
        )
      # A stop string that is one token ends a row like an end-of-sequence token. The others are cut from the text.
      encoded = [self.tokenizer.encode(text, add_special_tokens=False) for text in until]
      ends = {ids[0] for ids, text in zip(encoded, until) if len(ids) == 1 and self.tokenizer.decode(ids) == text}
      outputs = generate(
        self.model,
        [self.tok_encode(requests[i].args[0])[-room:] for i in numbers],
        length,
        eos_ids=tuple(sorted({self.eot_token_id, *self.eos_ids, *ends} - {None})),
        sampling=sampling,
        mode=self.mode,
        batch_size=self.batch_size,
        put=self.put,
      )
      for i, tokens in zip(numbers, outputs):
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in until:
          text = text.split(end)[0]
        texts[i] = text
        self.cache_hook.add_partial('generate_until', requests[i].args, text)
    return texts

  def _generation(self, gen_kwargs: dict) -> tuple[list[str], int, Sampling]:
    """Parses a task's generation_kwargs into (stop strings, largest number of new tokens, sampling)."""
    kwargs = dict(gen_kwargs)
    until = kwargs.pop('until', None) or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text]
    lengths = [kwargs.pop(name, None) for name in _LENGTHS]
    length = next((int(n) for n in lengths if n is not None), MAX_GEN_TOKS)
    temperature = float(kwargs.pop('temperature', None) or 0)
    if kwargs.pop('do_sample', None) is False:
      temperature = 0.0
    sampling = Sampling(temperature, int(kwargs.pop('top_k', None) or 0), float(kwargs.pop('top_p', None) or 1))
    for name, value in kwargs.items():
      if _NEUTRAL.get(name) != value:
        raise InputError(f'a task requests generation with {name}={value}, which is not supported; remove it.')
    return until, length, sampling
