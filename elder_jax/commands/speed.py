"""How much faster a pruned model is: prompt processing and generation, the dense model and the pruned one in turn.

`python -m elder_jax.speed --model=DENSE --pruned=FOLDER` prints a table. L layers without n of them are ideally L/(L − n)
times as fast; embedding and head do not shrink, and so a real ratio is a little lower. A CPU's times say nothing about
another computer's, so on a CPU only the ratios are given.
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

from absl import flags
import jax
import numpy as np

from elder_jax import log as log_lib
from elder_jax.commands import cli
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.hf import checkpoint_hf
from elder_jax.hf import verify
from elder_jax.hf.checkpoint_hf import Source
from elder_jax.model import pruning
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import Mode
from elder_jax.run import report as report_lib
from elder_jax.run.config import Config
from elder_jax.text import generation


@dataclasses.dataclass(frozen=True)
class Settings:
  """The command's flags; see define_flags."""

  model: str
  pruned: str = ''
  remove_layers: str = ''
  prompt_tokens: int = 2048
  new_tokens: int = 128
  context: int = 64
  batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
  repeats: int = 5
  dtype: str = 'float32'
  torch: bool = False
  seed: int = 0
  out: str = ''

  def check(self):
    """Raises InputError."""
    for name in ('prompt_tokens', 'new_tokens', 'context', 'repeats'):
      if not 1 <= (value := getattr(self, name)) < 2**31:
        raise InputError(f'--{name}={value}: must be at least 1 and below 2^31.')
    if not self.batch_sizes or not all(1 <= size < 2**31 for size in self.batch_sizes):
      given = ','.join(map(str, self.batch_sizes))
      raise InputError(f'--batch_sizes={given}: must be numbers of at least 1 and below 2^31, as in 1,16.')
    if self.seed < 0:
      raise InputError(f'--seed={self.seed} is negative; give 0 or more.')
    if bool(self.pruned) == bool(self.remove_layers):
      raise InputError('--pruned or --remove_layers: give one of them, the pruned folder or the layers to remove.')
    if self.torch:
      if not verify.has_torch():
        raise InputError('--torch: torch is not installed; install it or leave the flag away.')
      if self.remove_layers or any(user_path(name).suffix.lower() == '.gguf' for name in (self.model, self.pruned)):
        raise InputError('--torch: reads Hugging Face folders only; export both and name them by --model and --pruned.')


class Timed(NamedTuple):
  """What is timed of a model; both return when the device is done, and with a call for whether the logits are finite."""

  prompt: Callable  # of tokens_BT: fills a cache and gives the logits of the token after each row
  generate: Callable  # of tokens_BT and a number: so many new tokens for each row, greedy


def measure(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> dict:
  """Times both models; what goes into --out.

  Raises:
    InputError, before any weights are read where it is not for what they hold.
  """
  settings.check()
  out = cli.out_file(settings.out)
  with tempfile.TemporaryDirectory() as dense_scratch, tempfile.TemporaryDirectory() as pruned_scratch:
    dense = checkpoint_hf.open_source(settings.model, pathlib.Path(dense_scratch))
    pruned, removed = None, []
    if settings.remove_layers:
      removed = _removed(settings, dense.num_layers)
    else:
      pruned = _open_pruned(settings, dense, pathlib.Path(pruned_scratch))
    _check_lengths(settings, [source for source in (dense, pruned) if source])
    log_lib.say(f'loading {settings.model} and the pruned model in {settings.dtype}')
    if settings.torch:
      models, about = _in_torch(dense, pruned, settings.dtype)
    else:
      models, about = _in_jax(dense, pruned, removed, settings.dtype)

  draw = np.random.default_rng(settings.seed)
  tokens = lambda *shape: draw.integers(0, dense.spec.vocab_size, shape).astype(np.int32)
  depths = dense.num_layers, pruned.num_layers if pruned else dense.num_layers - len(removed)

  def check(finite: list[Callable[[], bool]]):
    pruned_flag = 'pruned' if settings.pruned else 'remove_layers'
    for flag, is_finite in zip(('model', pruned_flag), finite):
      if not is_finite():
        raise InputError(
          f'--{flag}={getattr(settings, flag)}: the logits are not finite; check the weights, or use --dtype=float32.'
        )

  def row(what: str, run: Callable[[Timed], Callable[[], bool]], new_tokens: int = 0):
    log_lib.say(what)
    seconds = alternate([functools.partial(run, model) for model in models], settings.repeats, clock, check)
    return {'what': what, **figures(*seconds, *depths, new_tokens, about['absolute'])}

  prompt_BT = tokens(1, settings.prompt_tokens)
  rows = [row(f'prompt of {settings.prompt_tokens}', lambda model: model.prompt(prompt_BT))]
  for batch_size in settings.batch_sizes:
    context_BT, n = tokens(batch_size, settings.context), settings.new_tokens
    what = f'{settings.context} + {n} tokens, batch {batch_size}'
    rows.append(row(what, lambda model: model.generate(context_BT, n), batch_size * n))
  result = {
    'settings': dataclasses.asdict(settings),
    'layers': dict(zip(('dense', 'pruned'), depths)),
    'rows': rows,
    'device': about['device'],
    'versions': report_lib.versions() | about['versions'],
  }
  if out and jax.process_index() == 0:
    report_lib.write_json(out, result)
  return result


def _check_lengths(settings: Settings, sources: list[Source]):
  for source in sources:
    limit = source.context_length or math.inf
    if settings.prompt_tokens > limit:
      raise InputError(
        f'--prompt_tokens={settings.prompt_tokens}: {source.name} has {limit} positions; give at most that many.'
      )
    if settings.context + settings.new_tokens > limit:
      raise InputError(
        f'--context={settings.context} and --new_tokens={settings.new_tokens}: {source.name} has {limit} positions; '
        'give at most that many together.'
      )


def _removed(settings: Settings, num_layers: int) -> list[int]:
  removed = Config(remove_layers=settings.remove_layers).layers_given()
  if not removed or not set(removed) < set(range(num_layers)):
    raise InputError(
      f'--remove_layers={settings.remove_layers}: must name some, but not all, of the layers 0 to {num_layers - 1}.'
    )
  return removed


def _open_pruned(settings: Settings, dense: Source, scratch: pathlib.Path) -> Source:
  try:
    pruned = checkpoint_hf.open_source(settings.pruned, scratch)
  except InputError as e:
    raise InputError(str(e).replace('--model=', '--pruned=', 1)) from e
  sizes = lambda source: (source.spec.sizes(1), source.spec.tied)
  if sizes(pruned) != sizes(dense) or pruned.num_layers >= dense.num_layers:
    raise InputError(f'--pruned={settings.pruned}: is not --model={settings.model} with fewer layers; check both.')
  return pruned


# ---- the two frameworks ----


_prefill = jax.jit(generation.prefill, static_argnames=('capacity', 'mode'))


def _in_jax(dense: Source, pruned: Source | None, removed: list[int], dtype: str):
  """([Timed of dense and of pruned], what there is to tell)."""
  mode = Mode(dtype=dtype)

  def timed(model: Decoder) -> Timed:
    lengths_B = lambda tokens_BT: np.full(len(tokens_BT), tokens_BT.shape[1], np.int32)

    def prompt(tokens_BT):
      logits_BV, cache = _prefill(model, tokens_BT, lengths_B(tokens_BT), tokens_BT.shape[1], mode)
      jax.block_until_ready((logits_BV, cache))
      return lambda: bool(np.isfinite(logits_BV).all())

    def generate(tokens_BT, n):
      B, T = tokens_BT.shape
      no_end_E, rows_B = np.zeros(0, np.int32), np.arange(B, dtype=np.int32)
      rest = no_end_E, np.int32(n), jax.random.key(0)
      new_BR = generation.run(model, tokens_BT, lengths_B(tokens_BT), rows_B, *rest, capacity=T + n, room=n, mode=mode)
      new_BR.block_until_ready()
      return lambda: bool((np.asarray(new_BR) != generation.NOT_FINITE).all())

    return Timed(prompt, generate)

  model = checkpoint_hf.load(dense, dtype)
  smaller = checkpoint_hf.load(pruned, dtype) if pruned else pruning.prune(model, removed)
  about = {'absolute': jax.default_backend() != 'cpu', 'device': report_lib.device(), 'versions': {}}
  return [timed(model), timed(smaller)], about


def _in_torch(dense: Source, pruned: Source, dtype: str):
  """As _in_jax."""
  import torch  # not a requirement of the package
  import transformers

  @contextlib.contextmanager
  def in_one_sentence():
    try:
      yield
    except Exception as e:  # of any kind: transformers' own, or a GPU's memory  # noqa: BLE001
      raise InputError(f'--torch: transformers cannot run a model ({reason(e)}); leave the flag away.') from e

  cuda = torch.cuda.is_available()
  where = torch.device('cuda' if cuda else 'cpu')

  @in_one_sentence()
  def timed(source: Source) -> Timed:
    model = transformers.AutoModelForCausalLM.from_pretrained(source.files, dtype=getattr(torch, dtype))
    model = model.to(where).eval()
    last = {'logits_to_keep': 1} if 'logits_to_keep' in inspect.signature(model.forward).parameters else {}

    def on_device(run):
      @in_one_sentence()
      def call(tokens_BT, *args):
        with torch.inference_mode():
          result = run(torch.tensor(tokens_BT, dtype=torch.long, device=where), *args)
        if cuda:
          torch.cuda.synchronize()
        return lambda: bool(torch.isfinite(result).all())  # tokens always are: the prompt's logits answer for them

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


# ---- the figures ----


def alternate(
  runs: list[Callable], repeats: int, clock: Callable[[], float], check: Callable[[list], None] = lambda results: None
) -> list[list[float]]:
  """Seconds of each call of each of `runs`, alternating, after one untimed call of each that compiles.

  Args:
    check: of the results of the untimed calls.
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
  """Speed of pruned over that of dense, by the medians; `ratios` are those of the single pairs, to see the spread.

  Args:
    new_tokens: of all rows together, for tokens/s; 0: milliseconds are given.
    absolute: give these, too.
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
    value = lambda s: new_tokens / s if new_tokens else 1e3 * s
    row |= {'unit': 'tokens/s' if new_tokens else 'ms', 'dense': value(dense), 'pruned': value(pruned)}
  return row


def markdown(result: dict) -> str:
  """The table, and where it was measured."""
  rows = result['rows']
  absolute = ['dense', 'pruned'] if 'unit' in rows[0] else []
  head = ['what', *absolute, 'ratio', 'L/(L − n)', 'ratio / ideal']
  cells = [head, ['---', *('---:' for _ in head[1:])]]
  for row in rows:
    values = [f'{report_lib.figure(row.get(name), 1, limit=1e9)} {row["unit"]}' for name in absolute]
    cells.append(
      [row['what'], *values, *(report_lib.figure(row.get(name), 3) for name in ('ratio', 'ideal', 'of_ideal'))]
    )
  layers, settings = result['layers'], result['settings']
  return '\n'.join(
    [
      *('| ' + ' | '.join(row) + ' |' for row in cells),
      '',
      f'{layers["dense"]} → {layers["pruned"]} layers, {settings["dtype"]}, medians of {settings["repeats"]}, in turn. '
      f'Device: {result["device"]}.',
      'Versions: ' + ', '.join(f'{k} {v}' for k, v in result['versions'].items()) + '.',
    ]
  )


# ---- the command ----


def define_flags():
  """Only when this is the command: some have the names of flags of elder_jax.config."""
  text = functools.partial(flags.DEFINE_string, module_name='elder_jax', flag_values=flags.FLAGS)
  number = functools.partial(flags.DEFINE_integer, module_name='elder_jax', flag_values=flags.FLAGS)
  kwargs = {'module_name': 'elder_jax', 'flag_values': flags.FLAGS}
  text('model', '', 'The dense model: a Hugging Face folder, a hub id or a .gguf file.')
  text('pruned', '', 'The pruned model, such as an export.')
  text('remove_layers', '', 'In place of --pruned: layers to remove in memory, by 0-based number, e.g. 3,5.')
  number('prompt_tokens', 2048, 'Length of the prompt of which the processing is timed, at batch 1.')
  number('new_tokens', 128, 'Tokens to generate per row.')
  number('context', 64, 'Length of the prompts that they follow.')
  flags.DEFINE_list('batch_sizes', '1,4,16,64', 'Rows that are generated side by side.', **kwargs)
  number('repeats', 5, 'Times that each is timed; the medians count.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of weights and computation.', **kwargs)
  flags.DEFINE_boolean(
    'torch', False, 'Time transformers in PyTorch in place of JAX; both models as folders.', **kwargs
  )
  number('seed', 0, 'Seed of the tokens of the prompts.')
  text('out', '', 'File for the figures (JSON).')


def main(argv: list[str]):
  del argv
  values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
  try:
    sizes = tuple(int(size) for size in values['batch_sizes'])
  except ValueError as e:
    raise InputError(f'--batch_sizes={",".join(values["batch_sizes"])}: must be numbers, as in 1,16.') from e
  if values['torch']:
    jax.config.update('jax_platforms', 'cpu')  # else JAX takes the GPU's memory
  result = measure(Settings(**values | {'batch_sizes': sizes}))
  if jax.process_index() == 0:
    print(markdown(result))


if __name__ == '__main__':
  define_flags()
  cli.run(main)
