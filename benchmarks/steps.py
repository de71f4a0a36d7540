"""How fast are our steps? JAX against transformers in PyTorch, alternating in one process.

  python -m benchmarks.steps --model=FOLDER|FILE.gguf
  python -m benchmarks.steps --shape=llama2_7b --layers=8 --dtype=bfloat16 --batch=1 --seq_len=2048     (a GPU)

Both sides read the same weights and tokens and compute the same numbers: the loss of every case is compared before
anything is timed. Both use all cores. A case is one call: `forward` computes the loss of a batch; the others are whole
steps with clipped gradients and AdamW. `gates` trains one number per layer, `lora` factors of every matrix in the
layers, `full` the layers, `distilled` the same with half of the loss from an unchanged copy of the model.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from absl import app
from absl import flags
import jax
import numpy as np

from benchmarks.steps_torch import Torch
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.methods import elder
from elder_jax.model.program import forward_flops
from elder_jax.model.program import training_flops
from elder_jax.model.spec import Mode
from elder_jax.run.plan.compile import DEVICES
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.training import losses
from elder_jax.training.settings import TrainSettings
from elder_jax.training.terms import loss_terms
from elder_jax.training.trainer import begin_training

CASES = ('forward', 'gates', 'lora', 'full', 'distilled')
SHAPES = {
  'llama2_7b': dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000),
  'llama3_8b': dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
  ),
}

_MODEL = flags.DEFINE_string('model', '', 'A Hugging Face folder or a .gguf file.')
_SHAPE = flags.DEFINE_enum('shape', None, list(SHAPES), 'In place of --model: random weights of this shape.')
_LAYERS = flags.DEFINE_integer('layers', 8, 'Layers of --shape.', lower_bound=1)
_CASES = flags.DEFINE_list('cases', list(CASES), f'Some of {", ".join(CASES)}.')
_BATCH = flags.DEFINE_integer('batch', 2, 'Sequences of a batch.', lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer('seq_len', 512, 'Tokens of a sequence.', lower_bound=2)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Type of computation; trained weights are float32.'
)
_REMAT = flags.DEFINE_enum(
  'remat',
  'dots',
  ['none', 'dots', 'full'],
  'As --remat of elder_jax. Only `full` changes the other side, which then recomputes layers as well.',
)
_COMPILED = flags.DEFINE_bool('compiled', True, 'Also time torch.compile.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Alternating rounds; medians count.', lower_bound=1)
_CALLS = flags.DEFINE_integer('calls', 2, 'Calls per round and side.', lower_bound=1)
_JSON = flags.DEFINE_string('json', '', 'File for the figures.')

SETTINGS = TrainSettings(steps=1000, warmup_ratio=0.0, lr=1e-5)
RANK = 16


def settings_of(case: str) -> TrainSettings:
  changes = {'lora': dict(lora_rank=RANK), 'distilled': dict(distill=(0.5,))}
  return dataclasses.replace(SETTINGS, **changes.get(case, {}))


class Jax:
  """Our side: `call(case)` returns the loss after the device is done."""

  def __init__(self, source, tokens_BT: np.ndarray, dtype: str, remat: str):
    self.model = load_model(source, dtype)
    self.mode = Mode(dtype=dtype, remat=remat)
    self.tokens_BT = jax.numpy.asarray(tokens_BT)
    self.state = None

  def start(self, case: str):
    """Makes ready what the case needs; drops what the case before had."""
    self.state = None
    if case == 'forward':
      return
    settings = settings_of(case)
    if case == 'gates':
      gates = elder.GateSettings(lambda1=0.0, lr=1e-5)
      step, self.state, frozen = elder.begin(self.model, 1, gates, self.mode)
      terms = elder.terms(np.ones(self.model.num_layers, bool), 0.0)
    else:
      step, self.state, frozen = begin_training(self.model, settings, self.mode)
      terms = loss_terms(self.model.num_layers, [], settings, 0)
    args = (frozen, self.model if settings.taught else None), self.tokens_BT, terms
    self.step = step.lower(self.state, *args).compile()
    self.args = args

  def call(self, case: str) -> float:
    if case == 'forward':
      nll, count = losses.batch_nll(self.model, self.tokens_BT, None, self.mode)
      return float(nll / count)
    self.state, metrics = self.step(self.state, *self.args)
    loss = float(metrics['loss'])
    jax.block_until_ready(self.state)
    return loss

  def peak_bytes(self, case: str) -> int | None:
    """Of one call by the compiler: arguments and temporaries; None for `forward`, which is not compiled by hand."""
    if case == 'forward':
      return None
    about = self.step.memory_analysis()
    return (
      about.argument_size_in_bytes + about.output_size_in_bytes + about.temp_size_in_bytes - about.alias_size_in_bytes
    )


def measure(ours: Jax, theirs: list[Torch], case: str, rounds: int, calls: int) -> dict[str, dict]:
  """{side: {'seconds', 'peak_bytes'}} of one call; raises where the losses of the first calls differ."""
  sides = {'jax': ours, **{t.name: t for t in theirs}}
  losses_of = {}
  for name, side in sides.items():
    side.start(case)
    losses_of[name] = side.call(case)
    side.call(case)  # the first call may compile; a step after it may compile again
  apart = max(losses_of.values()) - min(losses_of.values())
  if not apart <= (1e-3 if _DTYPE.value == 'float32' else 0.05):
    raise SystemExit(f'{case}: the losses differ, so the sides do not compute the same: {losses_of}')
  seconds = {name: [] for name in sides}
  for _ in range(rounds):
    for name, side in sides.items():
      start = time.perf_counter()
      for _ in range(calls):
        side.call(case)
      seconds[name].append((time.perf_counter() - start) / calls)
  return {n: {'seconds': statistics.median(s), 'peak_bytes': sides[n].peak_bytes(case)} for n, s in seconds.items()}


def model_flops(spec, layers: int, seq_len: int, case: str) -> float:
  """Of a token: no recomputation."""
  if case == 'forward':
    return sum(forward_flops(spec, layers, seq_len))
  trained = {'gates': 'gates', 'lora': 'lora'}.get(case, 'blocks')
  teacher = sum(forward_flops(spec, layers, seq_len)) if case == 'distilled' else 0
  return training_flops(spec, layers, seq_len, trained) + teacher


def random_folder(shape: str, layers: int, folder: pathlib.Path) -> pathlib.Path:
  """A Hugging Face folder with random weights in bfloat16."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(**SHAPES[shape], num_hidden_layers=layers, max_position_embeddings=4096)
  with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
  model.save_pretrained(folder)
  return folder


def as_folder(model: str, scratch: pathlib.Path) -> pathlib.Path:
  """`model` as a folder that transformers reads: a GGUF file is exported once, in float32."""
  if not model.endswith('.gguf'):
    return pathlib.Path(model).expanduser()
  import elder_jax as ej

  ej.export(ej.load(model), scratch / 'dense', dtype='float32')
  return scratch / 'dense'


def table(rows: dict[str, dict], flops: dict[str, float], tokens: int, peak: float | None) -> str:
  """Markdown: tokens/s of each side, ratios, and MFU where the device's peak is known."""
  peers = [name for name in next(iter(rows.values())) if name != 'jax']
  head = ['step', 'JAX, tokens/s', *(f'{p}, tokens/s' for p in peers), *(f'JAX / {p}' for p in peers)]
  head += ['JAX, MFU', 'JAX, peak GiB'] + [f'{p}, peak GiB' for p in peers]
  lines = []
  for case, sides in rows.items():
    rate = {name: tokens / side['seconds'] for name, side in sides.items()}
    mfu = figure(100 * flops[case] * rate['jax'] / peak, 1) + '%' if peak else ''
    memory = [figure(b / 2**30) if (b := sides[name]['peak_bytes']) else '' for name in ('jax', *peers)]
    cells = [figure(rate[name], 0, limit=1e9) for name in ('jax', *peers)]
    lines.append([case, *cells, *(figure(rate['jax'] / rate[p]) for p in peers), mfu, *memory])
  return markdown_table(head, lines)


def main(_):
  unknown = set(_CASES.value) - set(CASES)
  if unknown or bool(_MODEL.value) == bool(_SHAPE.value):
    sys.exit(f'--cases takes {", ".join(CASES)}; give --model or --shape, one of them.')
  with tempfile.TemporaryDirectory() as scratch:
    scratch = pathlib.Path(scratch)
    if _SHAPE.value:
      folder = random_folder(_SHAPE.value, _LAYERS.value, scratch / 'random')
    else:
      folder = as_folder(_MODEL.value, scratch)
    source = open_source(str(folder), scratch / 'source')
    B, T = _BATCH.value, _SEQ_LEN.value
    tokens_BT = np.random.default_rng(0).integers(0, source.spec.vocab_size, (B, T), dtype=np.int32)
    ours = Jax(source, tokens_BT, _DTYPE.value, _REMAT.value)
    kinds = [False, True] if _COMPILED.value else [False]
    theirs = [Torch(folder, tokens_BT, _DTYPE.value, _REMAT.value, RANK, SETTINGS.lr, compiled) for compiled in kinds]
    rows = {}
    for case in _CASES.value:
      print(f'{case} …', file=sys.stderr, flush=True)
      rows[case] = measure(ours, theirs, case, _ROUNDS.value, _CALLS.value)
    layers, peak = source.num_layers, DEVICES.get(jax.devices()[0].device_kind, (None, None))[0]
    flops = {case: model_flops(source.spec, layers, T, case) for case in rows}
  print(table(rows, flops, B * T, peak))
  about = (
    f'{_MODEL.value and pathlib.Path(_MODEL.value).name or _SHAPE.value}, {layers} layers, {_DTYPE.value}, {B} × {T}'
  )
  versions = package_versions() | {'torch': theirs[0].version}
  print(f'\n{about}, remat {_REMAT.value}. Device: {device_name()}, {os.cpu_count()} cores.')
  print(f'Medians of {_ROUNDS.value} rounds. Versions: ' + ', '.join(f'{k} {v}' for k, v in versions.items()) + '.')
  if _JSON.value:
    result = {'rows': rows, 'flops_per_token': flops, 'tokens': B * T, 'about': about, 'device': device_name()}
    text = json.dumps(result | {'versions': versions}, indent=1)
    pathlib.Path(_JSON.value).write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  app.run(main)
