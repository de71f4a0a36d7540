"""Checks that a run has the same result on every mesh, number of simulated devices and number of processes.

  python -m benchmarks.meshes --workdir=FOLDER [--only=NAME,…]

Makes a tiny random Llama (needs torch). Runs both stages of the paper's method on it (gates, choice of layers, regularize,
removal, export) with the ordinary command, first on one device, then on each layout (several processes with
launch/local.sh). Prints how much the losses, gates and exported weights of each layout differ from those of one device.
Exits with 1 if a difference exceeds its limit.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import app
from absl import flags
import numpy as np
import safetensors.numpy

from elder_jax.run.tables import markdown_table

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for models, runs and logs; created if missing.', required=True)
_ONLY = flags.DEFINE_list('only', [], 'Layouts to run, by name; empty: all.')

# Name -> (processes, devices of each, --mesh).
LAYOUTS = {
  '1 device': (1, 1, '1,1,1'),
  '2 devices, data': (1, 2, '2,1,1'),
  '4 devices, fsdp × tp': (1, 4, '1,2,2'),
  '8 devices, data 8': (1, 8, '8,1,1'),
  '8 devices, data 4 × fsdp 2': (1, 8, '4,2,1'),
  '8 devices, data 2 × fsdp 4': (1, 8, '2,4,1'),
  '8 devices, fsdp 8': (1, 8, '1,8,1'),
  '8 devices, fsdp 4 × tp 2': (1, 8, '1,4,2'),
  '8 devices, fsdp 2 × tp 4': (1, 8, '1,2,4'),
  '8 devices, tp 8': (1, 8, '1,1,8'),
  '2 processes × 4 devices, fsdp 8': (2, 4, '1,8,1'),
  '2 processes × 2 devices, data 2 × tp 2': (2, 2, '2,1,2'),
  '4 processes × 2 devices, data 2 × fsdp 2 × tp 2': (4, 2, '2,2,2'),
}
ROOT = pathlib.Path(__file__).parents[1]
ALLOWED = {'losses': 1e-5, 'gates': 1e-5, 'weights': 1e-6}
MODEL = dict(
  vocab_size=264,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=6,
  num_attention_heads=8,
  num_key_value_heads=8,
  max_position_embeddings=256,
  tie_word_embeddings=True,
  initializer_range=0.2,
)
SETTINGS = dict(
  method='elder',
  selection='iterative',
  gate_steps=3,
  protect_first=1,
  protect_last=1,
  num_remove=2,
  recipe='regularize',
  order='joint',
  train_steps=4,
  lr=3e-4,
  compare='absorb_then_train',
  seq_len=32,
  num_sequences=32,
  batch_size=8,
  eval_batch_size=8,
  eval_seq_len=32,
  eval_tokens=512,
  verify='jax',
)


def make_model(folder: pathlib.Path):
  import tokenizers
  import torch
  import transformers

  torch.manual_seed(0)
  transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).save_pretrained(folder)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
  (folder / 'text.txt').write_text(
    ''.join(f'{i} times {i % 7} is {i * (i % 7)}, and not {i + 1}.\n' for i in range(999))
  )


def run(name: str, work: pathlib.Path) -> dict:
  """The results of a layout's run to compare: losses of all steps, gates of all rounds, layers, exported weights."""
  processes, devices, mesh = LAYOUTS[name]
  folder = work / name.replace(' ', '_').replace('×', 'x').replace(',', '')
  shutil.rmtree(folder, ignore_errors=True)
  model, text = work / 'model', work / 'model' / 'text.txt'
  texts = dict(train_data=text, eval_data=f'text={text}')
  settings = SETTINGS | texts | dict(model=model, mesh=mesh, workdir=folder)
  command = [sys.executable, '-m', 'elder_jax.main'] if processes == 1 else ['launch/local.sh', str(processes)]
  command += [f'--{k}={v}' for k, v in settings.items()]
  env = os.environ | {
    'PYTHON': sys.executable,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # compilation takes most of the time
    'LOGS': f'{folder}.logs',
  }
  log = folder.with_name(f'{folder.name}.log')
  with log.open('w') as file:
    if subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode:
      sys.exit(f'meshes: {name} failed; see {log}')
  report = json.loads((folder / 'report.json').read_text())
  steps = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  return {
    'device': report['device'],
    'layers': report['order'],
    'losses': np.array([step['loss'] for step in steps]),
    'gates': np.array(report['gates']),
    'weights': safetensors.numpy.load_file(folder / 'export' / 'model.safetensors'),
  }


def distance(a, b) -> float:
  if isinstance(a, dict):
    return max(distance(a[name], b[name]) for name in a)
  return float(np.abs(a - b).max())


def main(argv: list[str]):
  del argv
  work = pathlib.Path(_WORKDIR.value).absolute()
  work.mkdir(parents=True, exist_ok=True)
  if not (work / 'model' / 'text.txt').exists():
    make_model(work / 'model')
  first, *others = LAYOUTS
  expected, good = run(first, work), True
  rows = []
  for name in [n for n in others if not _ONLY.value or n in _ONLY.value]:
    got = run(name, work)
    far = {what: distance(got[what], expected[what]) for what in ALLOWED}
    same = got['layers'] == expected['layers']
    good &= same and all(far[what] <= ALLOWED[what] for what in ALLOWED)
    rows.append([name, 'the same' if same else str(got['layers']), *(f'{value:.1e}' for value in far.values())])
    print('  '.join(rows[-1]), file=sys.stderr, flush=True)
  print(markdown_table(['layout', 'layers', *ALLOWED], rows, text_columns=2))
  sys.exit(not good)


if __name__ == '__main__':
  app.run(main)
