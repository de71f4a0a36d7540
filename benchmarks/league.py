"""The table of closed forms, with and without training: every recipe on the same layers and the same text.

  python -m benchmarks.assets --gemma
  python -m benchmarks.league [--models=smollm2_135m,gemma3_270m] [--train=4,7,10] [--dtype=bfloat16]

Runs configs/MODEL_league.flags, which trains nothing. Then removes the layers that auto chose there once more, with 16
steps of training and three seeds. A finished run is not repeated. The results are printed as Markdown.
"""

import json
import pathlib

from absl import app
from absl import flags

from elder_jax import commands
from elder_jax.recipes import find_recipe
from elder_jax.recipes import label_of
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import ranges

# Model -> learning rate -> recipes. Rates of the best validation loss, searched for prune_then_train and absorb_then_train
# (benchmarks/results_rows.py); prune_comp is trained as the first, the maps as the second.
TRAINED = {
  'smollm2_135m': {
    3e-4: ('absorb_then_train', 'linear_patch_tuned', 'ghosted_then_train', 'replace_linear_then_train'),
    6e-4: ('prune_then_train', 'prune_comp_then_train'),
  },
  'gemma3_270m': {
    3e-5: ('absorb_then_train', 'linear_patch_tuned', 'ghosted_then_train'),
    1e-4: ('prune_then_train', 'prune_comp_then_train'),
  },
}
STEPS = 16  # of training, 1,024 tokens each
_WORKDIR = flags.DEFINE_string('workdir', 'runs/league', 'Folder of the runs.')
_MODELS = flags.DEFINE_list('models', list(TRAINED), 'Models, as in the names of the configs.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of text and training.')
_TRAIN = flags.DEFINE_list('train', ['4', '7', '10'], 'Numbers of removed layers whose rows are trained.')
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Type of computation.')


def run(model: str, name: str, *changes: str) -> dict:
  """The report of one run of the model's config with these changes."""
  folder = pathlib.Path(_WORKDIR.value) / model / name
  common = f'--config={model}_league', f'--workdir={folder}', f'--dtype={_DTYPE.value}', '--verify=jax'
  commands.run_verb('prune', [*common, '--distributed=off', *changes])
  return json.loads((folder / 'report.json').read_text(encoding='utf-8'))


def trained(model: str, layers: list[int], rate: float, recipes: tuple[str, ...]) -> dict:
  """{recipe: {text: cell}} after training, means over the seeds."""
  first = next(name for name in recipes if find_recipe(name).exportable)
  others = ','.join(name for name in recipes if name != first)
  changes = (
    f'--remove_layers={",".join(map(str, layers))}',
    f'--recipe={first}',
    f'--compare={others}',
    f'--train_steps={STEPS}',
    f'--lr={rate:g}',
    f'--seeds={",".join(_SEEDS.value)}',
  )
  report = run(model, f'{len(layers)}_layers_{rate:g}', *changes)
  return {
    row['recipe']: {text: spread(of_text) for text, of_text in row['ppl'].items()} for row in report['seeds']['rows']
  }


def spread(statistics: dict) -> str:
  """Mean ± sample standard deviation."""
  more = '' if statistics['deviation'] is None else f' ± {figure(statistics["deviation"])}'
  return figure(statistics['mean']) + more


def table(model: str) -> str:
  """Markdown: a row per recipe, two columns of figures per number of layers."""
  report = run(model, 'untrained')
  counts = {len(row['removed']): row['removed'] for row in report['rows'] if row['recipe'] == 'absorb'}
  texts = list(report['ppl'])
  cells: dict[tuple[str, int], dict[str, str]] = {}
  for row in report['rows']:
    cells[row['recipe'], len(row['removed'])] = {text: figure(ppl) for text, ppl in row['ppl'].items()}
  for count, layers in counts.items():
    if str(count) not in _TRAIN.value:
      continue
    for rate, recipes in TRAINED[model].items():
      for recipe, of_recipe in trained(model, layers, rate, recipes).items():
        cells[recipe, count] = of_recipe
  shown = sorted(counts)
  head = ['recipe', 'stock checkpoint', *(f'{n} layers: {text}' for n in shown for text in texts)]
  names = dict.fromkeys(recipe for recipe, _ in cells)
  rows = [
    [
      label_of(name),
      'yes' if find_recipe(name).exportable else 'no',
      *(cells.get((name, n), {}).get(text, '') for n in shown for text in texts),
    ]
    for name in names
  ]
  dense = ', '.join(f'{text} {figure(ppl["dense"])}' for text, ppl in report['ppl'].items())
  removed = '; '.join(f'{n}: {ranges(counts[n])}' for n in shown)
  return f'{model}. Dense: {dense}. Layers: {removed}.\n\n{markdown_table(head, rows, 2)}\n'


def main(argv):
  del argv
  print('\n'.join([table(model) for model in _MODELS.value]))


if __name__ == '__main__':
  app.run(main)
