"""Loading and writing of a checkpoint with Llama 2 7B's layers, on whatever device JAX finds.

  python -m benchmarks.load_7b --workdir=/tmp/load [--layers=3] [--rounds=3]

Writes a folder of random bfloat16 weights once (0.5 GB and 0.4 GB for each layer; 32 are the whole model), then times
checkpoint_hf.load and checkpoint_hf.save, each to its end on the device or the disk, SHA-256 included.
"""

import pathlib
import shutil
import statistics
import time

from absl import app
from absl import flags
import jax

from benchmarks import copy_7b
from elder_jax.hf import checkpoint_hf
from elder_jax.run import report as report_lib

_LAYERS = flags.DEFINE_integer('layers', 3, 'Layers of the model.')


def main(argv):
  del argv
  work = pathlib.Path(flags.FLAGS.workdir)
  folder, out = work / f'model-{_LAYERS.value}', work / 'out'
  if not folder.exists():
    copy_7b.write_model(folder, _LAYERS.value)
  source = checkpoint_hf.open_source(str(folder), folder)
  size = sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9
  loads, saves = [], []
  for _ in range(flags.FLAGS.rounds):
    start = time.monotonic()
    model = jax.block_until_ready(checkpoint_hf.load(source, 'bfloat16'))
    loads.append(time.monotonic() - start)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.monotonic()
    checkpoint_hf.save(checkpoint_hf.from_model(model), source, list(range(_LAYERS.value)), out, 'bfloat16', int(5e9))
    saves.append(time.monotonic() - start)
  for name, seconds in (('load', loads), ('save', saves)):
    shown = ', '.join(f'{s:.1f}' for s in seconds)
    print(f'{name}: {size:.1f} GB, seconds {shown}; median {size / statistics.median(seconds):.2f} GB/s')
  print(f'Device: {report_lib.device()}; ' + ', '.join(f'{k} {v}' for k, v in report_lib.versions().items()))


if __name__ == '__main__':
  app.run(main)
