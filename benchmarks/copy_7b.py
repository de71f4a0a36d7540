"""Compares removing 8 layers from a checkpoint of the size of Llama 2 7B with `cp` of the result.

  python -m benchmarks.copy_7b --workdir=/tmp/seven [--rounds=3]

Writes a folder of 13.5 GB (random bfloat16 weights) once. Then alternates `python -m elder_jax.main --recipe=none
--remove_layers=…`, in its own process, and `cp` of its export. Needs 40 GB of disk. Prints the seconds of both, their
ratio, and the peak resident memory of elder_jax. Before each, the source is evicted from the page cache if possible.
"""

import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

from absl import app
from absl import flags
import ml_dtypes
import numpy as np
import safetensors.numpy

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for the checkpoints.', required=True)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Runs of each.')
CONFIG = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 32000,
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'hidden_act': 'silu',
  'max_position_embeddings': 4096,
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
}
REMOVED = '21,22,23,24,25,26,27,28'


def write_model(folder: pathlib.Path, num_layers: int = 32):
  folder.mkdir(parents=True)
  D, F, V = 4096, 11008, 32000
  layer = {
    'self_attn.q_proj': (D, D),
    'self_attn.k_proj': (D, D),
    'self_attn.v_proj': (D, D),
    'self_attn.o_proj': (D, D),
    'mlp.gate_proj': (F, D),
    'mlp.up_proj': (F, D),
    'mlp.down_proj': (D, F),
    'input_layernorm': (D,),
    'post_attention_layernorm': (D,),
  }
  shards = [{'model.embed_tokens.weight': (V, D), 'lm_head.weight': (V, D), 'model.norm.weight': (D,)}]
  for start in range(0, num_layers, 8):
    layers = range(start, min(start + 8, num_layers))
    shards.append({f'model.layers.{l}.{n}.weight': s for l in layers for n, s in layer.items()})
  rng, where = np.random.default_rng(0), {}
  # Each tensor is a slice of one pool of random numbers: drawing 6.7e9 would take longer than all the rest.
  pool = (rng.standard_normal(2**27, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
  for i, shapes in enumerate(shards):
    name = f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
    tensors = {}
    for key, shape in shapes.items():
      size = int(np.prod(shape))
      start = int(rng.integers(0, len(pool) - size)) if size < len(pool) else 0
      tensors[key] = np.resize(pool[start:], size).reshape(shape)
      where[key] = name
    safetensors.numpy.save_file(tensors, folder / name, metadata={'format': 'pt'})
    print(f'wrote {folder / name}', flush=True)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  (folder / 'config.json').write_text(json.dumps(CONFIG | {'num_hidden_layers': num_layers}, indent=2))


def cold(folder: pathlib.Path):
  """Flushes pending writes and evicts the folder from the page cache."""
  os.sync()
  for path in folder.iterdir():
    with path.open('rb') as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str]) -> float:
  start = time.monotonic()
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  os.sync()
  return time.monotonic() - start


def main(argv):
  del argv
  work = pathlib.Path(_WORKDIR.value)
  model, run, copy = work / 'model', work / 'run', work / 'copy'
  if not (model / 'config.json').exists():
    shutil.rmtree(model, ignore_errors=True)
    # In its own process: the peak memory that the system reports for a child includes its parent's at the fork.
    writer = multiprocessing.get_context('spawn').Process(target=write_model, args=(model,))
    writer.start()
    writer.join()
  ours, cps = [], []
  for _ in range(_ROUNDS.value):
    shutil.rmtree(run, ignore_errors=True)
    cold(model)
    command = [sys.executable, '-m', 'elder_jax.main', f'--model={model}', f'--workdir={run}', '--recipe=none']
    ours.append(timed([*command, '--compare=', f'--remove_layers={REMOVED}']))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    export = run / 'export'
    size = sum(p.stat().st_size for p in export.iterdir()) / 1e9
    cold(export)
    cps.append(timed(['cp', '-r', str(export), str(copy)]))
    shutil.rmtree(copy)
    print(
      f'ours {ours[-1]:.1f} s, cp {cps[-1]:.1f} s, ratio {ours[-1] / cps[-1]:.2f}, peak RSS {peak:.2f} GB, {size:.1f} GB',
      flush=True,
    )
  ratio = statistics.median(a / b for a, b in zip(ours, cps))
  print(f'median ratio {ratio:.2f} of {_ROUNDS.value}; {size:.1f} GB written; peak RSS {peak:.2f} GB')
  timed([sys.executable, '-m', 'elder_jax', 'verify', str(run / 'export')])
  print('the files match their checksums')


if __name__ == '__main__':
  app.run(main)
