"""lm-evaluation-harness (0.4.x) runs our model: no torch is needed, and scores agree with the harness's `hf` backend.

Importing this module needs the package lm_eval; zero_shot.py is the way in that says so in one sentence.

Dimension names: see model.py. R is a request's row: context and continuation, cut to the model's context from the left.
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

MAX_GEN_TOKS = 256  # of a generation task that names none, as in the hf backend
# What a generation task may ask for; all but these are refused rather than passed over.
_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
_NEUTRAL = {'num_beams': 1, 'repetition_penalty': 1.0, 'min_p': 0.0, 'typical_p': 1.0}


@functools.partial(jax.jit, static_argnames='mode')
def token_scores(model: Decoder, tokens_BT, target_BT, mode: Mode):
  """log p(target) after each token, float32 [B, T], and whether target is the most probable one, bool [B, T].

  Goes through the sequence in chunks: [B, T, V] is never in memory, and nothing of size V leaves the devices.
  """
  x_BTD, _ = forward(model, tokens_BT, mode=mode)
  B, T = tokens_BT.shape
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
  """The length that a batch is padded to: four steps per power of two, so that few programs serve all lengths."""
  step = max(32, (1 << length.bit_length()) // 8)
  return -(-length // step) * step


def _check_finite(requests, scores: list[float]):
  for request, score in zip(requests, scores):
    if not math.isfinite(score):
      task = getattr(request, 'task_name', None) or 'a task'
      raise InputError(
        f'{task}: the model gives {score} for the log-probability of a text, so its answers mean nothing; check its '
        'weights, or use --dtype=float32.'
      )


class JaxLM(TemplateLM):
  """A Decoder as the harness sees it; every process of a run makes one, and all give the same answers.

  Args:
    tokenizer: of transformers.
    mode: of the computation; gates as they stand in the model (generation takes them as 1).
    batch_size: rows per step, fixed: the last batch is filled up.
    max_length: tokens that the model reads at most; longer requests lose tokens on the left.
    put: brings a host array onto the devices (sharding.put_batch).
    eos_ids: tokens that end a generated text besides the tokenizer's own (generate.eos_ids).
    progress: called with (requests done, requests in all) of the scoring.

  Raises InputError for requests that cannot be answered, and for a tokenizer with neither BOS nor EOS token.
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
    self.max_length = min(
      max_length, model.spec.most_positions or max_length
    )  # a config.json may leave it to its default
    self.put, self.eos_ids, self.progress = put, eos_ids, progress
    if self.prefix_token_id is None:
      raise InputError('the tokenizer has neither a BOS nor an EOS token; give another with --tokenizer.')

  @property
  def eot_token_id(self):
    return self.tokenizer.eos_token_id

  @property
  def prefix_token_id(self):
    """What a text without context is conditioned on."""
    bos = self.tokenizer.bos_token_id
    return self.eot_token_id if bos is None else bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Token ids; special tokens by the tokenizer's own rule, unless the text itself begins with one."""
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
    return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

  def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    answers = super().loglikelihood(requests, disable_tqdm=True)  # `progress` is what people see
    _check_finite(requests, [logp for logp, _ in answers])
    return answers

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # ty: ignore[incompatible-method-override]
    """(sum over the continuation of log p, whether greedy decoding gives it) of ((texts), context, continuation)s."""
    numbers: dict[tuple[int, ...], list[int]] = {}  # row -> its requests: equal ones are run once
    for i, (texts, context, continuation) in enumerate(requests):
      if not context or not 0 < len(continuation) <= self.max_length:
        raise InputError(
          f'a task asks for {texts}: a continuation of {len(continuation)} tokens after {len(context)}; there must be '
          f'a context, and 1 to {self.max_length} tokens after it.'
        )
      numbers.setdefault(tuple((context + continuation)[-(self.max_length + 1) :]), []).append(i)
    rows = sorted(numbers, key=lambda row: (-len(row), row))
    if rows and (largest := max(map(max, rows))) >= self.model.spec.vocab_size:
      raise InputError(
        f"the tokenizer gives the token {largest}, the model has {self.model.spec.vocab_size}; use the model's own."
      )

    answers, done = [(0.0, True)] * len(requests), 0
    for start in range(0, len(rows), self.batch_size):
      batch = rows[start : start + self.batch_size]
      logp_BT, greedy_BT = self._score(batch)
      for row, logp_T, greedy_T in zip(batch, logp_BT, greedy_BT):
        for i in numbers[row]:
          texts, _, continuation = requests[i]
          scored = slice(len(row) - 1 - len(continuation), len(row) - 1)
          answers[i] = (float(logp_T[scored].sum(dtype=np.float64)), bool(greedy_T[scored].all()))
          if texts is not None:  # None: a part of a text in loglikelihood_rolling
            self.cache_hook.add_partial('loglikelihood', texts, answers[i])
        done += len(numbers[row])
      self.progress(done, len(requests))
    return answers

  def _score(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """token_scores of rows of tokens, the longest first, on the host. Padding is on the right, where nobody sees it."""
    tokens_BT = np.zeros((self.batch_size, min(self.max_length, bucket(len(rows[0]) - 1))), np.int32)
    target_BT = np.zeros_like(tokens_BT)
    for tokens_T, target_T, row in zip(tokens_BT, target_BT, rows):
      tokens_T[: len(row) - 1], target_T[: len(row) - 1] = row[:-1], row[1:]
    scores = token_scores(self.model, self.put(tokens_BT), self.put(target_BT), self.mode)
    return tuple(map(hosts.to_host, scores))

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """log p of whole texts; those longer than the context in windows that predict each token once."""
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
    """What the model writes after each context, up to the first of the request's `until` strings."""
    groups: dict[str, list[int]] = {}  # requests of equal settings go together
    for i, request in enumerate(requests):
      groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
    texts = [''] * len(requests)
    for numbers in groups.values():
      gen_kwargs = requests[numbers[0]].args[1]
      until, length, sampling = self._generation(gen_kwargs)
      room = self.max_length - length
      if room < 1:
        raise InputError(
          f'a task asks for {length} new tokens, the model has a context of {self.max_length}; lower its max_gen_toks.'
        )
      # A string that is one token ends a row like an end-of-sequence token; the others are looked for in the text.
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
    """A task's generation_kwargs: strings to stop at, largest number of new tokens, how tokens are drawn."""
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
        raise InputError(f'a task asks for generation with {name}={value}, which is not supported; take it out.')
    return until, length, sampling
