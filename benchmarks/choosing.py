"""Does choosing take as long as the plan says? Over numbers of layers and of tokens, on the devices of this machine.

  python -m benchmarks.choosing --model=FOLDER|FILE.gguf [--methods=auto,taylor] [--depths=10,30] [--score_steps=2,4]

The model is cut to each depth. A first call compiles and is not timed, as the plan does not count compilation.
"""

import time

from absl import app
from absl import flags
import jax
import numpy as np

import elder_jax as ej
from elder_jax import methods
from elder_jax.devices import sharding
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.model import pruning
from elder_jax.recipes.context import Context
from elder_jax.run.config import Config
from elder_jax.run.plan.programs import programs_by_stage
from elder_jax.run.plan.programs import shapes_of
from elder_jax.run.plan.seconds import measure_speed
from elder_jax.run.plan.seconds import seconds_by_stage
from elder_jax.run.stages import stages
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table

_MODEL = flags.DEFINE_string('model', None, 'A Hugging Face folder or a .gguf file.', required=True)
_METHODS = flags.DEFINE_list('methods', ['auto', 'taylor'], 'Methods.')
_DEPTHS = flags.DEFINE_list('depths', ['10', '30'], 'Numbers of layers; a quarter of them is removed.')
_STEPS = flags.DEFINE_list('score_steps', ['2', '4'], 'Batches that are scored, of 4 × 256 tokens.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of computation.')


def config_of(method: str, score_steps: int, num_remove: int) -> Config:
  return Config.of(
    model=_MODEL.value,
    method=(method,),
    num_remove=num_remove,
    score_steps=score_steps,
    seq_len=256,
    batch_size=4,
    num_sequences=4 * 2 * score_steps,
    train_data=('text',),
    dtype=_DTYPE.value,
    compare=(),
  )


def estimated(config: Config, model, num_remove: int, mesh) -> float:
  """Seconds by the plan."""
  shapes = shapes_of(config, model.spec, model.num_layers, [num_remove], mesh)
  listed = [s for s in stages(config, [num_remove]) if s.title.startswith('choosing')]
  programs = programs_by_stage(shapes, listed)
  speed = measure_speed(shapes, programs[0])
  return sum(seconds_by_stage(listed, programs, speed).values())


def measured(config: Config, model, num_remove: int, batches: list) -> float:
  """Seconds of the second call; the first reads two batches and compiles."""
  for steps in (1, config.removal.score_steps):
    start = time.perf_counter()
    methods.choose(
      config.methods()[0],
      Context(model, batches[: 2 * steps], config.replace(score_steps=steps), config.mode()),
      num_remove,
    )
  return time.perf_counter() - start


def main(_):
  rows, mesh = [], sharding.make_mesh((-1, 1, 1))
  text = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    dense = ej.load(_MODEL.value, dtype=_DTYPE.value).decoder
    for depth in map(int, _DEPTHS.value):
      model = pruning.prune(dense, list(range(depth, dense.num_layers)))
      for method in _METHODS.value:
        for steps in map(int, _STEPS.value):
          num_remove = max(1, depth // 4)
          config = config_of(method, steps, num_remove)
          batches = [
            sharding.put_batch(text.integers(0, model.spec.vocab_size, (4, 256), dtype=np.int32), mesh)
            for _ in range(2 * steps)
          ]
          said = estimated(config, model, num_remove, mesh)
          took = measured(config, model, num_remove, batches)
          rows.append([method, str(depth), str(steps * 1024), figure(said, 1), figure(took, 1), figure(said / took)])
          print(rows[-1], flush=True)
  print(markdown_table(['method', 'layers', 'tokens', 'plan, s', 'took, s', 'ratio'], rows))
  print(f'\n{_DTYPE.value}. Device: {device_name()}.')
  print('Versions: ' + ', '.join(f'{k} {v}' for k, v in package_versions().items()) + '.')


if __name__ == '__main__':
  app.run(main)
