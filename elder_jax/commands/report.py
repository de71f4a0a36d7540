"""`elder_jax report RUN…`: the tables of finished runs, and their pages."""

import dataclasses
import json

from elder_jax import extras
from elder_jax.commands.command import Command
from elder_jax.commands.command import out_file
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.errors import user_path
from elder_jax.run import curve
from elder_jax.run import page
from elder_jax.run.page.data import Finished
from elder_jax.run.page.data import read_run
from elder_jax.run.plot import plot_curve
from elder_jax.run.report import markdown
from elder_jax.settings import Settings
from elder_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class ReportSettings(Settings):
  """What is written in addition to each run's page."""

  out: str = setting('compare.html', 'File for the comparison of several runs.')
  png: bool = setting(False, "Write each run's charts as PNG files into its folder, too.")


def run(parsed: Parsed):
  settings, several = ReportSettings(**parsed.settings), len(parsed.operands) > 1
  if 'out' in parsed.settings and not several:
    raise InputError('out', settings.out, 'is for the comparison of several runs; give more than one, or leave it out.')
  if settings.png:
    extras.require('matplotlib', '--png')
  reports = [_read(name) for name in parsed.operands]
  out = out_file(settings.out) if several else None
  print('\n\n'.join(markdown(report) for report in reports))
  runs = [_write(name, report, settings.png) for name, report in zip(parsed.operands, reports)]
  if out is not None:
    page.write_comparison(runs, out)
    print(f'The comparison: {out}')


def _write(name: str, report: dict, png: bool) -> Finished:
  """Writes what a run's folder holds of its report besides report.json and report.md."""
  path = user_path(name)
  folder = path if path.is_dir() else path.parent
  shown = name if path.is_dir() else str(folder)
  html = folder / page.NAME if path.is_dir() else path.with_suffix('.html')
  finished = read_run(report, folder, shown)
  try:
    page.write(finished, html)
    print(f'The report: {html}')
    if path.is_dir() and curve.curves_of(report) and extras.is_installed('matplotlib'):
      plot_curve(report, folder / 'curve.svg')
    if png:
      for picture in page.write_pictures(finished, folder):
        print(f'A chart: {picture}')
  except OSError as e:
    raise InputError(f'{folder}: cannot be written ({reason(e)}); copy the run to another folder.') from e
  return finished


def _read(name: str) -> dict:
  folder = user_path(name)
  path = folder / 'report.json' if folder.is_dir() else folder
  if not path.is_file():
    raise InputError(f'{path}: there is no such file; give the work folder of a finished run.')
  try:
    report = json.loads(path.read_text(encoding='utf-8'))
    if isinstance(report, dict) and markdown(report):
      return report
    raise ValueError('it is not a JSON object')
  except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
    raise InputError(
      f'{path}: is not the report of a run ({reason(e)}); give the work folder of a finished run.'
    ) from e


COMMAND = Command(
  'report',
  'Print the reports of finished runs and write report.html into their folders; compare several on one page.',
  run,
  {'Files': ReportSettings},
  ('elder_jax report runs/mine', 'elder_jax report runs/a runs/b --out=compare.html --png'),
  operand='RUN',
  operands=(1, 1000),
)
