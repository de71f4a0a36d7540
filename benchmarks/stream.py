"""Measures training on a large corpus: time to the first step, memory, loader speed, kills, and two processes.

  python -m benchmarks.stream --model=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=/tmp/stream [--tokens=100] [--files=50]

The corpus is synthetic: random words in .jsonl.gz files. Memory and speed are measured with SmolLM2; kills and two
processes with a random model of four layers and SmolLM2's tokenizer.
"""

import gzip
import json
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import app
from absl import flags
import numpy as np
import safetensors.numpy

from elder_jax.hf.source import open_source
from elder_jax.text import data
from elder_jax.text.settings import DataSettings
from elder_jax.text.training_text import open_text

_MODEL = flags.DEFINE_string('model', None, "SmolLM2's GGUF.", required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the corpus and runs; the corpus is reused.', required=True)
_TOKENS = flags.DEFINE_integer('tokens', 100, 'Size of the corpus, in millions of tokens.')
_FILES = flags.DEFINE_integer('files', 50, 'Files of the corpus.')
_KILLS = flags.DEFINE_integer('kills', 5, 'Number of steps at which a run is killed.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the corpus and the kills.')

STEPS, BATCH, LENGTH = 40, 4, 256
FLAGS = ['--method=last', '--recipe=prune_then_train', '--compare=', '--verify=jax']
FLAGS += [f'--batch_size={BATCH}', f'--seq_len={LENGTH}', '--lr=1e-3']


def make_corpus(folder: pathlib.Path, tokens: int, files: int):
  """Writes random words of a vocabulary of 20,000, in documents of 300 words."""
  if len([*folder.glob('*.jsonl.gz')]) == files:
    return
  folder.mkdir(parents=True, exist_ok=True)
  rng, letters = np.random.default_rng(_SEED.value), np.array(list('etaoinshrdlucmfw'))
  words = np.array([''.join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)])
  documents = tokens // files // 750  # measured: 2.5 tokens a word
  for i in range(files):
    with gzip.open(folder / f'{i:03d}.jsonl.gz', 'wt', compresslevel=1) as file:
      for _ in range(documents):
        file.write(json.dumps({'text': ' '.join(words[rng.integers(0, len(words), 300)])}) + '\n')
    print(f'corpus: {i + 1}/{files} files', file=sys.stderr, flush=True)


def write_small_model(folder: pathlib.Path):
  """A random Llama with SmolLM2's tokenizer."""
  import transformers

  if (folder / 'config.json').exists():
    return
  config = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
  )
  transformers.LlamaForCausalLM(config).save_pretrained(folder)
  with tempfile.TemporaryDirectory() as scratch:
    files = open_source(_MODEL.value, pathlib.Path(scratch)).files
    for path in files.iterdir():
      if path.name.startswith(('tokenizer', 'special_tokens', 'chat_template', 'vocab', 'merges')):
        shutil.copy(path, folder / path.name)


def start(workdir: pathlib.Path, corpus: pathlib.Path, model: pathlib.Path, *more: str) -> subprocess.Popen:
  command = [sys.executable, '-m', 'elder_jax', 'prune', f'--model={model}', f'--workdir={workdir}', *FLAGS]
  command += [f'--train_data={corpus}', *more]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with pathlib.Path(f'{workdir}.log').open('a') as out:
    return subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)


def rows_of(workdir: pathlib.Path) -> list[dict]:
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith('}')]


def peak_bytes(pid: int) -> int:
  status = pathlib.Path(f'/proc/{pid}/status')
  try:
    return 1024 * int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith('VmHWM')))
  except (OSError, StopIteration):
    return 0


def watched(workdir: pathlib.Path, *args) -> tuple[float, int, list[dict]]:
  """Runs to the end. Returns (seconds to the first step, peak bytes, metrics)."""
  began, first, peak = time.monotonic(), None, 0
  process = start(workdir, *args)
  while process.poll() is None:
    peak = max(peak, peak_bytes(process.pid))
    if first is None and rows_of(workdir):
      first = time.monotonic() - began
    time.sleep(0.2)
  if process.returncode:
    sys.exit(f'{workdir}.log: the run ended with {process.returncode}')
  return first, peak, rows_of(workdir)


def tensors_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  files = (workdir / 'export').glob('*.safetensors')
  return {name: a for path in files for name, a in safetensors.numpy.load_file(path).items()}


def speed_and_memory(root: pathlib.Path, corpus: pathlib.Path):
  smollm2 = pathlib.Path(_MODEL.value).expanduser()
  one = next(iter(sorted(corpus.iterdir())))
  runs, figures = root / 'runs', {}
  sequences = _TOKENS.value * 10**6 // LENGTH // BATCH * BATCH // 2
  for name, text, count in (('a file', one, 4 * BATCH), ('corpus', corpus, sequences)):
    shutil.rmtree(root / 'cache', ignore_errors=True)
    shutil.rmtree(runs / name, ignore_errors=True)
    more = [f'--num_sequences={count}', '--train_steps=4', '--num_remove=7', f'--token_cache={root / "cache"}']
    figures[name] = watched(runs / name, text, smollm2, *more)
  first, peak, rows = figures['corpus']
  print(
    f'first step after {first:.0f} s; peak memory {(peak - figures["a file"][1]) / 1e9:+.2f} GB compared with one file'
  )
  training = np.median([row['tokens_per_second'] for row in rows if row.get('tokens_per_second')])
  tokenizer = data.load_tokenizer(str(root / 'model'))
  settings = DataSettings(
    train_data=(str(corpus),), seq_len=LENGTH, num_sequences=sequences, token_cache=str(root / 'loader')
  )
  shutil.rmtree(root / 'loader', ignore_errors=True)
  for name in ('made', 'kept'):
    began = time.monotonic()
    text = open_text(settings, tokenizer, False, 49152)
    count = 8192
    for i in range(0, count, BATCH):
      text.rows[range(i, i + BATCH)]
    speed = count * LENGTH / (time.monotonic() - began)
    print(
      f'loader, tokens {name}: {speed:,.0f} tokens/s, {speed / training:,.0f} × the speed of training ({training:,.0f})'
    )


def kills(root: pathlib.Path, corpus: pathlib.Path):
  model, runs = root / 'model', root / 'runs'
  more = [f'--num_sequences={100 * STEPS}', f'--train_steps={STEPS}', '--num_remove=1', '--checkpoint_every=3']
  more += [f'--token_cache={root / "cache"}']
  for name in ('whole', 'killed'):
    shutil.rmtree(runs / name, ignore_errors=True)
  watched(runs / 'whole', corpus, model, *more)
  moments = sorted(random.Random(_SEED.value).sample(range(3, STEPS - 1), _KILLS.value))
  for moment in moments:
    process = start(runs / 'killed', corpus, model, *more)
    while process.poll() is None and len(rows_of(runs / 'killed')) < moment:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  watched(runs / 'killed', corpus, model, *more)
  whole, killed = tensors_of(runs / 'whole'), tensors_of(runs / 'killed')
  equal = whole.keys() == killed.keys() and all(np.array_equal(whole[name], killed[name]) for name in whole)
  print(f'killed at steps {moments}: {"bit-equal" if equal else "NOT EQUAL"}')


def two_processes(root: pathlib.Path, corpus: pathlib.Path):
  runs = root / 'runs'
  more = [f'--num_sequences={100 * STEPS}', f'--train_steps={STEPS}', '--num_remove=1']
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  shutil.rmtree(runs / 'two', ignore_errors=True)
  both = [f'--coordinator=localhost:{port}', '--num_processes=2']
  processes = [start(runs / 'two', corpus, root / 'model', *more, *both, f'--process_id={i}') for i in range(2)]
  if any(process.wait() for process in processes):
    sys.exit(f'{runs / "two"}.log: a process failed')
  losses = [np.array([row['loss'] for row in rows_of(runs / name)]) for name in ('whole', 'two')]
  print(f'two processes: largest relative difference of losses {np.abs(losses[1] / losses[0] - 1).max():.1e}')


def main(argv):
  del argv
  root = pathlib.Path(_WORKDIR.value)
  corpus = root / 'corpus'
  make_corpus(corpus, _TOKENS.value * 10**6, _FILES.value)
  write_small_model(root / 'model')
  speed_and_memory(root, corpus)
  kills(root, corpus)
  two_processes(root, corpus)


if __name__ == '__main__':
  app.run(main)
