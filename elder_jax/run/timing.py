"""Measures the speed-up of a pruned model: prompt processing and generation, alternating with the dense model.

Removing n of L layers ideally gives a speed-up of L / (L − n). The measured ratio is a little lower, because embedding and
head do not shrink. Times on one CPU do not apply to another, so only ratios are reported on a CPU.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import inspect
import math
import pathlib
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import verify
from elder_jax.hf.load import load_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.spec import Mode
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text.decoding import NOT_FINITE
from elder_jax.text.decoding import prefill
from elder_jax.text.decoding import run_prompts


@dataclasses.dataclass(frozen=True)
class SpeedSettings(Settings):
  """What to time, and how often."""

  model: str = setting('', 'The dense model: a Hugging Face folder, a hub id or a .gguf file.')
  pruned: str = setting('', 'The pruned model, such as an export.')
  remove_layers: tuple[int, ...] = setting(
    (), 'Layers to remove in memory, 0-based, as in 3,5 or 12-18, instead of --pruned.'
  )
  prompt_tokens: int = setting(
    2048, 'Tokens of the prompt whose processing is timed, at batch size 1.', least=1, below=2**31
  )
  new_tokens: int = setting(128, 'Tokens to generate per sequence.', least=1, below=2**31)
  context: int = setting(64, 'Tokens of the prompts for generation.', least=1, below=2**31)
  batch_sizes: tuple[int, ...] = setting((1, 4, 16, 64), 'Batch sizes for generation.', least=1, below=2**31)
  repeats: int = setting(5, 'Number of measurements of each; medians are reported.', least=1, below=2**31)
  dtype: str = setting('float32', 'Type of weights and computation.', choices=('float32', 'bfloat16'))
  torch: bool = setting(False, 'Time transformers in PyTorch instead of JAX. Both models must be folders.')
  seed: int = setting(0, 'Seed for the random tokens of the prompts.', least=0)
  out: str = setting('', 'JSON file for the results.')

  def check(self):
    """Raises InputError for settings that exclude each other."""
    if not self.batch_sizes:
      raise InputError('batch_sizes', '', 'is empty; give numbers, as in 1,16.')
    if bool(self.pruned) == bool(self.remove_layers):
      raise InputError('give either --pruned, a pruned model, or --remove_layers, the layers to remove.')
    if self.torch:
      if not verify.has_torch():
        raise InputError('torch', 'true', 'torch is not installed; install it or leave the flag out.')
      if self.remove_layers or any(user_path(name).suffix.lower() == '.gguf' for name in (self.model, self.pruned)):
        raise InputError('torch', 'true', 'reads Hugging Face folders only; give two folders as --model and --pruned.')


class Timed(NamedTuple):
  """The timed functions of a model. Both wait for the device and return a function: whether the logits were finite."""

  prompt: Callable  # (tokens_BT): fills a cache and computes the next token's logits of each sequence
  generate: Callable  # (tokens_BT, n): generates n tokens per sequence, greedily


def measure(
  settings: SpeedSettings, clock: Callable[[], float] = time.perf_counter, out: pathlib.Path | None = None
) -> dict:
  """Times both models by `clock`, in seconds, and returns the results, which are also written to `out`.

  Raises:
    InputError: bad settings or models. Only logits that are not finite are found after reading the weights.
  """
  settings.check()
  with tempfile.TemporaryDirectory() as dense_scratch, tempfile.TemporaryDirectory() as pruned_scratch:
    dense = open_source(settings.model, pathlib.Path(dense_scratch))
    pruned, removed = None, []
    if settings.remove_layers:
      removed = _removed(settings, dense.num_layers)
    else:
      pruned = _open_pruned(settings, dense, pathlib.Path(pruned_scratch))
    _check_lengths(settings, [source for source in (dense, pruned) if source])
    log(f'loading {settings.model} and the pruned model in {settings.dtype}')
    if settings.torch:
      models, about = _in_torch(dense, pruned, settings.dtype)
    else:
      models, about = _in_jax(dense, pruned, removed, settings.dtype)

  draw = np.random.default_rng(settings.seed)

  def tokens(*shape):
    return draw.integers(0, dense.spec.vocab_size, shape).astype(np.int32)

  depths = dense.num_layers, pruned.num_layers if pruned else dense.num_layers - len(removed)

  def check(finite: list[Callable[[], bool]]):
    pruned_flag = 'pruned' if settings.pruned else 'remove_layers'
    for flag, is_finite in zip(('model', pruned_flag), finite):
      if not is_finite():
        raise InputError(
          flag, getattr(settings, flag), 'the logits are not finite; check the weights or use --dtype=float32.'
        )

  def row(what: str, run: Callable[[Timed], Callable[[], bool]], new_tokens: int = 0):
    log(what)
    seconds = alternate([functools.partial(run, model) for model in models], settings.repeats, clock, check)
    return {'what': what, **figures(*seconds, *depths, new_tokens, about['absolute'])}

  prompt_BT = tokens(1, settings.prompt_tokens)
  rows = [row(f'prompt of {settings.prompt_tokens}', lambda model: model.prompt(prompt_BT))]
  for batch_size in settings.batch_sizes:
    context_BT, n = tokens(batch_size, settings.context), settings.new_tokens
    what = f'{settings.context} + {n} tokens, batch {batch_size}'
    rows.append(row(what, lambda model, T=context_BT, n=n: model.generate(T, n), batch_size * n))
  result = {
    'settings': dataclasses.asdict(settings),
    'layers': dict(zip(('dense', 'pruned'), depths)),
    'rows': rows,
    'device': about['device'],
    'versions': package_versions() | about['versions'],
  }
  if out and jax.process_index() == 0:
    write_json(out, result)
  return result


def _check_lengths(settings: SpeedSettings, sources: list[Source]):
  for source in sources:
    limit = source.context_length or math.inf
    if settings.prompt_tokens > limit:
      raise InputError(
        'prompt_tokens', settings.prompt_tokens, f'{source.name} has {limit} positions; use at most that many.'
      )
    if settings.context + settings.new_tokens > limit:
      raise InputError(
        f'--context={settings.context} and --new_tokens={settings.new_tokens}: {source.name} has {limit} positions; '
        'use at most that many in total.'
      )


def _removed(settings: SpeedSettings, num_layers: int) -> list[int]:
  removed = sorted(settings.remove_layers)
  if not set(removed) < set(range(num_layers)):
    raise InputError('remove_layers', removed, f'must name some of the layers 0 to {num_layers - 1}, but not all.')
  return removed


def _open_pruned(settings: SpeedSettings, dense: Source, scratch: pathlib.Path) -> Source:
  try:
    pruned = open_source(settings.pruned, scratch)
  except InputError as e:
    raise (InputError('pruned', settings.pruned, e.why) if e.setting else e) from e

  def sizes(source):
    return (source.spec.sizes(1), source.spec.tied)

  if sizes(pruned) != sizes(dense) or pruned.num_layers >= dense.num_layers:
    raise InputError('pruned', settings.pruned, f'is not --model={settings.model} with fewer layers; check both.')
  return pruned


# ---- the two frameworks ----


_prefill = jax.jit(prefill, static_argnames=('capacity', 'mode'))


def _in_jax(dense: Source, pruned: Source | None, removed: list[int], dtype: str):
  """Returns ([Timed of dense, Timed of pruned], {'absolute', 'device', 'versions'})."""
  mode = Mode(dtype=dtype)

  def timed(model: Decoder) -> Timed:
    def lengths_B(tokens_BT):
      return np.full(len(tokens_BT), tokens_BT.shape[1], np.int32)

    def prompt(tokens_BT):
      logits_BV, cache = _prefill(model, tokens_BT, lengths_B(tokens_BT), tokens_BT.shape[1], mode)
      jax.block_until_ready((logits_BV, cache))
      return lambda: bool(np.isfinite(logits_BV).all())

    def generate(tokens_BT, n):
      B, T = tokens_BT.shape
      no_end_E, rows_B = np.zeros(0, np.int32), np.arange(B, dtype=np.int32)
      rest = no_end_E, np.int32(n), jax.random.key(0)
      new_BR = run_prompts(model, tokens_BT, lengths_B(tokens_BT), rows_B, *rest, capacity=T + n, room=n, mode=mode)
      new_BR.block_until_ready()
      return lambda: bool((np.asarray(new_BR) != NOT_FINITE).all())

    return Timed(prompt, generate)

  model = load_model(dense, dtype)
  smaller = load_model(pruned, dtype) if pruned else pruning.prune(model, removed)
  about = {'absolute': jax.default_backend() != 'cpu', 'device': device_name(), 'versions': {}}
  return [timed(model), timed(smaller)], about


def _in_torch(dense: Source, pruned: Source, dtype: str):
  """As _in_jax."""
  import torch  # an optional dependency

  @contextlib.contextmanager
  def in_one_sentence():
    try:
      yield
    except Exception as e:  # transformers' own errors, or an exhausted GPU  # noqa: BLE001
      raise InputError('torch', 'true', f'transformers cannot run a model ({reason(e)}); leave the flag out.') from e

  cuda = torch.cuda.is_available()
  where = torch.device('cuda' if cuda else 'cpu')

  @in_one_sentence()
  def timed(source: Source) -> Timed:
    kind = verify.torch_class(source.whole.config if source.whole else source.config)
    model = kind.from_pretrained(source.files, dtype=getattr(torch, dtype))
    model = model.to(where).eval()
    last = {'logits_to_keep': 1} if 'logits_to_keep' in inspect.signature(model.forward).parameters else {}

    def on_device(run):
      @in_one_sentence()
      def call(tokens_BT, *args):
        with torch.inference_mode():
          result = run(torch.tensor(tokens_BT, dtype=torch.long, device=where), *args)
        if cuda:
          torch.cuda.synchronize()
        return lambda: bool(torch.isfinite(result).all())  # generated tokens always are, so only logits are checked

      return call

    def generate(tokens_BT, n):
      mask_BT = torch.ones_like(tokens_BT)
      return model.generate(
        tokens_BT, attention_mask=mask_BT, min_new_tokens=n, max_new_tokens=n, do_sample=False, pad_token_id=0
      )

    return Timed(on_device(lambda tokens_BT: model(tokens_BT, use_cache=True, **last).logits), on_device(generate))

  device = torch.cuda.get_device_name() if cuda else 'cpu'
  about = {'absolute': cuda, 'device': f'{device}, by PyTorch', 'versions': {'torch': torch.__version__}}
  return [timed(dense), timed(pruned)], about


# ---- the results ----


def alternate(
  runs: list[Callable], repeats: int, clock: Callable[[], float], check: Callable[[list], None] = lambda results: None
) -> list[list[float]]:
  """Returns the seconds of `repeats` calls of each of `runs`, alternating, after one untimed call each for compilation.

  Args:
    clock: returns seconds.
    check: called with the results of the untimed calls.
  """
  check([run() for run in runs])
  seconds = [[] for _ in runs]
  for _ in range(repeats):
    for run, taken in zip(runs, seconds):
      start = clock()
      run()
      taken.append(clock() - start)
  return seconds


def figures(
  dense_s: list[float], pruned_s: list[float], dense_layers: int, pruned_layers: int, new_tokens: int, absolute: bool
) -> dict:
  """Returns the speed-up of pruned over dense, by medians. `ratios` has that of each pair, to show the spread.

  Args:
    dense_s, pruned_s: seconds of each call.
    new_tokens: generated by a call, summed over the batch, for tokens/s; 0: report milliseconds.
    absolute: also report tokens/s or milliseconds.
  """
  dense, pruned = statistics.median(dense_s), statistics.median(pruned_s)
  ratio, ideal = dense / pruned, dense_layers / pruned_layers
  row = {
    'ratio': ratio,
    'ideal': ideal,
    'of_ideal': ratio / ideal,
    'ratios': [a / b for a, b in zip(dense_s, pruned_s)],
  }
  if absolute:

    def value(s):
      return new_tokens / s if new_tokens else 1e3 * s

    row |= {'unit': 'tokens/s' if new_tokens else 'ms', 'dense': value(dense), 'pruned': value(pruned)}
  return row
