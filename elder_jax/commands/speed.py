"""`elder_jax speed`: measures the speed-up of a pruned model."""

import jax

from elder_jax.commands.command import Command
from elder_jax.commands.command import out_file
from elder_jax.commands.flags import Parsed
from elder_jax.run import timing
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.timing import SpeedSettings


def markdown(result: dict) -> str:
  """Returns the table and a description of the measurement, in Markdown."""
  absolute = ['dense', 'pruned'] if 'unit' in result['rows'][0] else []
  rows = []
  for row in result['rows']:
    values = [f'{figure(row.get(name), 1, limit=1e9)} {row["unit"]}' for name in absolute]
    rows.append([row['what'], *values, *(figure(row.get(name), 3) for name in ('ratio', 'ideal', 'of_ideal'))])
  layers, settings = result['layers'], result['settings']
  versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  return '\n'.join(
    [
      markdown_table(['what', *absolute, 'ratio', 'L/(L − n)', 'ratio / ideal'], rows),
      '',
      f'{layers["dense"]} → {layers["pruned"]} layers, {settings["dtype"]}. Medians of {settings["repeats"]} alternating '
      f'measurements. Device: {result["device"]}.',
      f'Versions: {versions}.',
    ]
  )


def run(parsed: Parsed):
  settings = SpeedSettings(**parsed.settings)
  settings.check()
  out = out_file(settings.out)
  if settings.torch:
    jax.config.update('jax_platforms', 'cpu')  # otherwise JAX would reserve the GPU's memory
  result = timing.measure(settings, out=out)
  if jax.process_index() == 0:
    print(markdown(result))


COMMAND = Command(
  'speed',
  'Measure how much faster a pruned model is than the dense one: prompt processing and generation.',
  run,
  {'Models and lengths': SpeedSettings},
  (
    'elder_jax speed --model=DENSE --pruned=runs/mine/export',
    'elder_jax speed --model=DENSE --remove_layers=12-18 --batch_sizes=1,16',
  ),
)
