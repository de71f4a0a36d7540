"""What a page is made of: the files of a finished run."""

from collections.abc import Iterable
import dataclasses
import json
import pathlib
import re

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.log import log
from elder_jax.run import usage
from elder_jax.run.config import defaults
from elder_jax.run.config import settings_of_json
from elder_jax.run.tables import number

SPEED = 'speed.json'  # in the work folder: what `elder_jax speed --out` writes
_POINTS = 50  # of a curve at most


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run.

  name: its work folder as the user writes it.
  losses: {index of a row: [(tokens, LM loss on the training text)]}; each point is the mean of `mean_of` steps.
  settings: those that are not the defaults.
  speed: the figures of `elder_jax speed`.
  files: what the exported folder holds.
  """

  report: dict
  name: str
  losses: dict[int, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)
  mean_of: int = 1
  settings: dict = dataclasses.field(default_factory=dict)
  speed: dict | None = None
  files: usage.Files = usage.NOTHING

  @property
  def export(self) -> str:
    """The exported folder or file."""
    return '/'.join(filter(None, (self.name.rstrip('/'), 'export', self.files.gguf)))


def read_run(report: dict, folder: pathlib.Path, name: str) -> Finished:
  """A run by its report and the other files of its work folder, of which any may be missing."""
  losses, mean_of = _losses(report, folder)
  settings = _json(folder / 'config.json')
  return Finished(
    report, name, losses, mean_of, _changed(settings or {}), _speed(report, folder), _files(folder / 'export')
  )


def _files(export: pathlib.Path) -> usage.Files:
  """What the exported folder holds, as far as it can be read: it may be gone, or the package gguf be missing."""
  if not export.is_dir():
    return usage.NOTHING
  try:
    return usage.files_of(export)
  except (InputError, OSError, ImportError) as e:
    log(f'{export}: cannot be read ({reason(e)}); the report gives commands for any model')
    return usage.NOTHING._replace(gguf=next((path.name for path in sorted(export.glob('*.gguf'))), ''))


def _json(path: pathlib.Path) -> dict | None:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError):
    log(f'{path}: is not readable as JSON; the report leaves it out')
    return None
  return value if isinstance(value, dict) else None


def _changed(settings: dict) -> dict:
  default = json.loads(json.dumps(defaults()))
  return {
    name: value
    for name, value in json.loads(json.dumps(settings_of_json(settings))).items()
    if value != default[name] and name != 'workdir'
  }


def _speed(report: dict, folder: pathlib.Path) -> dict | None:
  """speed.json, if it is of this model."""
  found = _json(folder / SPEED)
  if found is None:
    return None
  layers = found.get('layers')
  if not isinstance(layers, dict) or not isinstance(found.get('rows'), list):
    log(f'{folder / SPEED}: is not what elder_jax speed --out writes; the report leaves it out')
    return None
  if layers.get('pruned') != len(report['kept']):
    log(f'{folder / SPEED}: is of {layers.get("pruned")} layers, the export has {len(report["kept"])}; left out')
    return None
  return found


def _losses(report: dict, folder: pathlib.Path) -> tuple[dict[int, list[tuple[float, float]]], int]:
  """(Finished.losses, Finished.mean_of) out of metrics.jsonl, which is the runs' own where several are one."""
  tokens = report.get('tokens_per_step')
  rows = report['rows']
  if not tokens or not report.get('steps'):
    return {}, 1
  found: dict[int, list[float]] = {}
  of_series = {folder / 'runs' / f'round_{row["round"]}' for row in rows if 'round' in row}
  of_series |= {folder / 'runs' / report['folder']} if 'folder' in report else set()
  for where in sorted({folder, *of_series}):
    by_stage = _by_stage(where / 'metrics.jsonl')
    for i, row in enumerate(rows):
      if 'round' not in row or where.name == f'round_{row["round"]}':
        steps = next((by_stage[name] for name in _stages(row) if name in by_stage), None)
        if steps:
          found[i] = steps
  mean_of = max((-(-len(steps) // _POINTS) for steps in found.values()), default=1)
  return {i: list(_means(steps, mean_of, tokens)) for i, steps in found.items()}, mean_of


def _stages(row: dict) -> list[str]:
  """What the training of a row may be called (run/stages.py)."""
  names = f'{row["method"]}-{len(row["removed"])}-{row["recipe"]}', row['recipe']
  return [re.sub(r'[^\w.-]', '_', name) for name in names]


def _by_stage(path: pathlib.Path) -> dict[str, list[float]]:
  """{stage: the LM loss of each step}."""
  found: dict[str, list[float]] = {}
  if not path.is_file():
    return found
  with path.open(encoding='utf-8', errors='replace') as file:
    for line in file:
      try:
        row = json.loads(line)
        found.setdefault(row['stage'], []).append(number(row['lm_loss']))
      except (ValueError, TypeError, KeyError):  # half a line, or a held-out loss, which the report has as well
        continue
  return found


def _means(steps: list[float], mean_of: int, tokens: int) -> Iterable[tuple[float, float]]:
  for start in range(0, len(steps), mean_of):
    part = steps[start : start + mean_of]
    yield (start + len(part)) * tokens, sum(part) / len(part)
