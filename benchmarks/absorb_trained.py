"""Does the gain of today's `absorb` over the one until 2026-11-28 last through training?

  python -m benchmarks.assets --brown
  python -m benchmarks.absorb_trained [--seeds=0,1,2] [--tokens=16k,128k] [--dtype=bfloat16]

Removes layers 12 to 18 of SmolLM2-135M and trains it as configs/smollm2_135m_healing.flags does, once after each `absorb`
and for every seed. The older one refits the down
projection of the layer before the gap alone. Each run keeps its work folder and is not repeated.
"""

import functools
import json
import pathlib
from unittest import mock

from absl import app
from absl import flags
import numpy as np

from elder_jax import commands
from elder_jax.recipes import absorb
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table

_WORKDIR = flags.DEFINE_string('workdir', 'runs/absorb_trained', 'Folder of the runs.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of text and training.')
_TOKENS = flags.DEFINE_list('tokens', ['16k', '128k'], 'Values of --train_tokens.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of computation.')

# Name -> what replaces the names of elder_jax/recipes/absorb.py.
OLD = 'until 2026-11-28'
VARIANTS = {
  OLD: dict(RIDGE=0.1, absorb=functools.partial(absorb.absorb, after=0, attention=False)),
  'today': dict(RIDGE=absorb.RIDGE, absorb=absorb.absorb),
}
RUN = ('--config=smollm2_135m_healing', '--remove_layers=12-18', '--compare=', '--verify=jax', '--distributed=off')


def measured(name: str, tokens: str, seed: int) -> dict[str, float]:
  """{text: perplexity} of one run."""
  folder = pathlib.Path(_WORKDIR.value) / f'{name.split()[0]}_{tokens}_{seed}'
  changes = f'--train_tokens={tokens}', f'--seed={seed}', f'--dtype={_DTYPE.value}', f'--workdir={folder}'
  with mock.patch.multiple(absorb, **VARIANTS[name]):
    commands.run_verb('prune', [*RUN, *changes])
  report = json.loads((folder / 'report.json').read_text(encoding='utf-8'))
  return {text: figures['pruned'] for text, figures in report['ppl'].items()}


def main(argv):
  del argv
  rows = []
  for tokens in _TOKENS.value:
    found = {name: [measured(name, tokens, int(seed)) for seed in _SEEDS.value] for name in VARIANTS}
    values = {name: {text: np.array([run[text] for run in runs]) for text in runs[0]} for name, runs in found.items()}
    for name, of_text in values.items():
      rows.append([tokens, name, *(shown(of_text[text]) for text in of_text)])
    ratios = [values['today'][text] / values[OLD][text] for text in values[OLD]]
    rows.append([tokens, 'ratio, seed by seed', *(shown(ratio, 3) for ratio in ratios)])
  print(markdown_table(['tokens', 'absorb', *values[OLD]], rows))


def shown(values: np.ndarray, digits: int = 2) -> str:
  """Mean ± sample standard deviation."""
  return figure(values.mean(), digits) + (f' ± {figure(values.std(ddof=1), digits)}' if len(values) > 1 else '')


if __name__ == '__main__':
  app.run(main)
