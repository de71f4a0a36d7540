"""`elder_jax report RUN…`: the tables of finished runs."""

import json

from elder_jax import extras
from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.run import curve
from elder_jax.run.plot import plot_curve
from elder_jax.run.report import markdown


def run(parsed: Parsed):
  reports = [_read(name) for name in parsed.operands]
  for name, report in zip(parsed.operands, reports):
    folder = user_path(name)
    if folder.is_dir() and curve.curves_of(report):
      extras.require('matplotlib', f'{folder}/curve.svg')
      plot_curve(report, folder / 'curve.svg')
  print('\n\n'.join(markdown(report).rstrip() for report in reports))


def _read(name: str) -> dict:
  folder = user_path(name)
  path = folder / 'report.json' if folder.is_dir() else folder
  if not path.is_file():
    raise InputError(f'{path}: there is no such file; give the work folder of a finished run.')
  try:
    report = json.loads(path.read_text(encoding='utf-8'))
    return report if isinstance(report, dict) and markdown(report) else {}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
    raise InputError(f'{path}: is no report of a run ({reason(e)}); give the work folder of a finished run.') from e


COMMAND = Command(
  'report',
  'Print the reports of finished runs; of those that measured held-out losses also draw the curve (curve.svg).',
  run,
  operand='RUN',
  operands=(1, 1000),
  examples=('elder_jax report runs/mine', 'elder_jax report runs/a runs/b'),
)
