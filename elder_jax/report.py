"""report.json for programs and report.md for people."""

import importlib.metadata
import json
import os
import pathlib
import platform

import jax

SCHEMA = 1
NAMES = {
  'dense': 'dense',
  'none': 'direct removal',
  'prune_then_train': 'prune, then train',
  'regularize': 'regularise, then prune',
}


def versions() -> dict[str, str]:
  packages = ('elder_jax', 'jax', 'jaxlib', 'flax', 'optax', 'transformers', 'datasets', 'numpy')
  found = {'python': platform.python_version()}
  for package in packages:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
      found[package] = 'not installed'
  return found


def device() -> str:
  devices = jax.devices()
  return f'{len(devices)} × {devices[0].device_kind}, {jax.process_count()} process(es)'


def write_json(path: pathlib.Path, value: dict):
  """Under a temporary name, renamed when whole."""
  temporary = path.with_name(f'{path.name}.partial')
  temporary.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')
  os.replace(temporary, path)


def table(report: dict) -> str:
  """Markdown: a row per model, perplexity on each corpus."""
  corpora = list(report['ppl'])
  rows = [['model', 'layers', *(f'PPL {c}' for c in corpora)], ['---', '---:', *('---:' for _ in corpora)]]
  figure = lambda value: f'{value:.2f}' if value < 1e4 else f'{value:.2g}'
  dense = [figure(report['ppl'][c]['dense']) for c in corpora]
  rows.append([NAMES['dense'], str(report['num_layers']), *dense])
  for recipe in sorted(report['recipes'], key=list(NAMES).index):
    ppl = report['recipes'][recipe]['ppl']
    name = NAMES[recipe] + (' (exported)' if recipe == report['recipe'] else '')
    rows.append([name, str(len(report['kept'])), *(figure(ppl[c]) for c in corpora)])
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def verdict(report: dict) -> list[str]:
  """One sentence per corpus on which another recipe, on the same layers, was better than the exported one."""
  lines = []
  for corpus in report['ppl']:
    by_ppl = {r: v['ppl'][corpus] for r, v in report['recipes'].items()}
    best = min(by_ppl, key=by_ppl.get)
    if best != report['recipe']:
      lines.append(
        f'On {corpus}, "{NAMES[best]}" is better than the exported "{NAMES[report["recipe"]]}": '
        f'{by_ppl[best]:.2f} against {by_ppl[report["recipe"]]:.2f}.'
      )
  return lines


def markdown(report: dict) -> str:
  params = report['params']
  lines = [
    f'# {report["model"]}: {report["num_layers"]} → {len(report["kept"])} layers',
    '',
    f'Removed (0-based, numbers of the dense model): {report["removed"]}. Kept: {report["kept"]}.',
    f'Parameters: {params["dense"] / 1e6:.1f} M → {params["pruned"] / 1e6:.1f} M '
    f'({100 * (1 - params["pruned"] / params["dense"]):.1f}% fewer).',
    '',
  ]
  if report['ppl']:
    lines += [table(report), '']
    lines += [f'{line}\n' for line in verdict(report)]
    for corpus, about in report['corpora'].items():
      lines.append(
        f'- {corpus}: {about["source"]}, sha256 {about["sha256"][:16]}…, {about["windows"]} windows of '
        f'{about["window"]} tokens, BOS: {about["bos"]}.'
      )
    lines += [f'- Protocol: {next(iter(report["corpora"].values()))["protocol"]}.', '']
  if report['gates']:
    final = report['gates'][-1]
    lines += ['Gates at the end of stage 1: ' + ', '.join(f'{l}: {g:.3f}' for l, g in enumerate(final)) + '.', '']
  seconds = ', '.join(f'{stage} {s:.0f}' for stage, s in report['seconds'].items())
  lines += [
    f'Seconds: {seconds}. Device: {report["device"]}.',
    'Versions: ' + ', '.join(f'{k} {v}' for k, v in report['versions'].items()) + '.',
  ]
  return '\n'.join(lines) + '\n'
