"""MaxText's own training steps, estimated from the TPU compiler's text as benchmarks/scale.py estimates ours.

  python -m benchmarks.maxtext [--texts=FOLDER] [NAMES OF ROWS]

Runs where maxtext (0.2.4 or newer, Python 3.12), libtpu and elder_jax are installed, without a TPU. Writes a line per row
to benchmarks/maxtext.jsonl; python -m benchmarks.scale shows them beside ours. A row takes minutes.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app
from absl import flags

from benchmarks import hlo

_TEXTS = flags.DEFINE_string(
  'texts', '', 'Folder that keeps the compiled texts; those that are there are not compiled.'
)
KEPT = pathlib.Path(__file__).parent / 'maxtext.jsonl'

# Compiler flags and settings of MaxText's own scripts in maxtext/configs/tpu: v5e/{16b,32b,llama2_7b}.sh,
# v5p/llama2_70b.sh and v6e/llama2_7b_4096.sh.
FLAGS = (
  '--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true '
  '--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true '
  '--xla_enable_async_all_gather=true'
)
FLAGS_V5E = (
  f'{FLAGS} --xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true'
)
FLAGS_V5P = (
  f'{FLAGS_V5E} --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true '
  '--xla_tpu_enable_ag_backward_pipelining=true'
)
FLAGS_V6E = f'{FLAGS} --xla_tpu_scoped_vmem_limit_kib=98304'
SETTINGS = 'steps=15 max_target_length=2048 use_iota_embed=true reuse_example_batch=1 attention=flash'
# Row -> (settings, MFU in % that maxtext/configs/tpu/v5e/README.md publishes, measured on TPUs).
ROWS = {
  # The sequences per chip of our row; the 4 of the script do not fit this slice.
  'LLaMA-2-7B, v5e-16': (
    'model_name=llama2-7b compile_topology=v5e-16 per_device_batch_size=1 remat_policy=save_qkv_proj',
    None,
  ),
  'LLaMA-3-8B, v6e-16': (
    'model_name=llama3.1-8b compile_topology=v6e-16 per_device_batch_size=1 remat_policy=save_qkv_proj',
    None,
  ),
  'LLaMA-2-70B, v5p-128': (
    'model_name=llama2-70b compile_topology=v5p-128 per_device_batch_size=1 remat_policy=save_dot_except_mlpwi',
    None,
  ),
  '16B, v5e-256': (
    'global_parameter_scale=16 compile_topology=v5e-256 per_device_batch_size=6 remat_policy=full',
    61.10,
  ),
  '32B, v5e-256': (
    'global_parameter_scale=32 compile_topology=v5e-256 per_device_batch_size=4 remat_policy=full',
    66.86,
  ),
}
# Generation -> (device kind, compiler flags).
GENERATIONS = {'v5e': ('TPU v5 lite', FLAGS_V5E), 'v5p': ('TPU v5', FLAGS_V5P), 'v6e': ('TPU v6 lite', FLAGS_V6E)}


def generation(name: str) -> tuple[str, str]:
  """(device kind, compiler flags) of a row."""
  return GENERATIONS[name.split(', ')[1][:3]]


def compile_text(name: str, file: pathlib.Path):
  """Runs MaxText's train_compile and writes the compiled program, and what MaxText says of its FLOPs beside it."""
  from maxtext.trainers.pre_train import train_compile
  from maxtext.utils import maxtext_utils

  compiling = train_compile.jit_and_compile

  def keep(*args, **kwargs):
    compiled = compiling(*args, **kwargs)
    config = next(a for a in args if hasattr(a, 'per_device_batch_size'))
    memory = compiled.memory_analysis()
    about = {
      'tokens_per_chip': int(config.per_device_batch_size * config.max_target_length),
      'tflops': float(maxtext_utils.calculate_tflops_training_per_device(config)[0]),
      'peak': memory.peak_memory_in_bytes,
    }
    file.with_suffix('.json').write_text(json.dumps(about))
    file.write_text(compiled.as_text())
    return compiled

  train_compile.jit_and_compile = keep
  found = importlib.util.find_spec('maxtext')
  config = pathlib.Path(found.submodule_search_locations[0]) / 'configs' / 'base.yml'
  plain = 'run_name=row enable_checkpointing=false dataset_type=synthetic skip_jax_distributed_system=true'
  with tempfile.TemporaryDirectory() as folder:
    more = f'{plain} compile_topology_num_slices=1 base_output_directory={folder} {SETTINGS} {ROWS[name][0]}'
    train_compile.main(['train_compile', str(config), *more.split()])
  train_compile.jit_and_compile = compiling


def estimate(name: str, folder: pathlib.Path) -> dict:
  file = folder / (name.replace(', ', '_').replace(' ', '_') + '.txt')
  if not file.exists():
    compile_text(name, file)
  row = {'name': name, 'settings': ROWS[name][0], 'published': ROWS[name][1]}
  row |= json.loads(file.with_suffix('.json').read_text()) | hlo.estimate(file.read_text(), generation(name)[0])
  row['versions'] = {p: importlib.metadata.version(p) for p in ('maxtext', 'jax', 'libtpu')}
  return row | {'date': datetime.date.today().isoformat()}


def read() -> dict[str, dict]:
  lines = KEPT.read_text().splitlines() if KEPT.exists() else []
  return {row['name']: row for row in map(json.loads, lines)}


def main(argv):
  names = argv[1:] or list(ROWS)
  if len(names) > 1:  # the compiler reads its flags once per process
    for name in names:
      subprocess.run([sys.executable, '-m', 'benchmarks.maxtext', f'--texts={_TEXTS.value}', name], check=True)
    return
  (name,) = names
  os.environ['LIBTPU_INIT_ARGS'] = generation(name)[1]
  os.environ['JAX_PLATFORMS'] = 'cpu'
  with tempfile.TemporaryDirectory() as folder:
    found = estimate(name, pathlib.Path(_TEXTS.value or folder))
  rows = read() | {name: found}
  KEPT.write_text(''.join(json.dumps(rows[n]) + '\n' for n in ROWS if n in rows))
  print(found)


if __name__ == '__main__':
  app.run(main)
