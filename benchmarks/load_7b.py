"""Times loading and saving a checkpoint with the layers of Llama 2 7B, on JAX's default device.

  python -m benchmarks.load_7b --workdir=/tmp/load [--layers=3] [--rounds=3]

Writes a folder of random bfloat16 weights once (0.5 GB plus 0.4 GB per layer; the whole model has 32). Then times
load_model until the arrays are on the device, and save_model until the files are on disk, SHA-256 included.
"""

import pathlib
import shutil
import statistics
import time

from absl import app
from absl import flags
import jax

from benchmarks import copy_7b
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.hf.load import load_model
from elder_jax.hf.save import pieces_of_model
from elder_jax.hf.save import save_model
from elder_jax.hf.source import open_source

_LAYERS = flags.DEFINE_integer('layers', 3, 'Layers of the model.')


def main(argv):
  del argv
  work = pathlib.Path(flags.FLAGS.workdir)
  folder, out = work / f'model-{_LAYERS.value}', work / 'out'
  if not folder.exists():
    copy_7b.write_model(folder, _LAYERS.value)
  source = open_source(str(folder), folder)
  size = sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e9
  loads, saves = [], []
  for _ in range(flags.FLAGS.rounds):
    start = time.monotonic()
    model = jax.block_until_ready(load_model(source, 'bfloat16'))
    loads.append(time.monotonic() - start)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    start = time.monotonic()
    save_model(pieces_of_model(model), source, list(range(_LAYERS.value)), out, 'bfloat16', int(5e9))
    saves.append(time.monotonic() - start)
  for name, seconds in (('load', loads), ('save', saves)):
    shown = ', '.join(f'{s:.1f}' for s in seconds)
    print(f'{name}: {size:.1f} GB, seconds {shown}; median {size / statistics.median(seconds):.2f} GB/s')
  print(f'Device: {device_name()}; ' + ', '.join(f'{k} {v}' for k, v in package_versions().items()))


if __name__ == '__main__':
  app.run(main)
