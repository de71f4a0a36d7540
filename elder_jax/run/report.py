"""report.json for programs and report.md for people."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform

import jax

from elder_jax import log as log_lib

SCHEMA = 2
NAMES = {
  'dense': 'dense',
  'none': 'direct removal',
  'prune_then_train': 'prune, then train',
  'replace_linear': 'replaced by a linear map',
  'replace_linear_then_train': 'replaced by a linear map, then train',
  'regularize': 'regularise, then prune',
  'absorb': 'absorb',
  'absorb_then_train': 'absorb, then train',
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


def peak_bytes() -> int | None:
  """The most memory that one of this process's devices held so far; None where devices do not tell (CPU)."""
  peaks = [(d.memory_stats() or {}).get('peak_bytes_in_use') for d in jax.local_devices()]
  return None if None in peaks else max(peaks)


def write_json(path: pathlib.Path, value: dict):
  """Writes what JSON can hold: NaN and infinities become null, which the tables show as "—"."""
  log_lib.write_whole(path, json.dumps(_finite_or_none(value), indent=2, allow_nan=False) + '\n')


def _finite_or_none(value):
  if isinstance(value, dict):
    return {key: _finite_or_none(v) for key, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite_or_none(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- figures, any of which may be missing, no number, or not finite ----


def number(value) -> float:
  """The value, or NaN for what is no finite number."""
  return value if isinstance(value, int | float) and math.isfinite(value) else math.nan


def figure(value, digits: int = 2, limit: float = 1e4) -> str:
  """With `digits` after the point; from `limit` on as in 1.2e+05."""
  value = number(value)
  if math.isnan(value):
    return '—'
  return f'{value:.{digits}f}' if abs(value) < limit else f'{value:.2g}'


def millions(report: dict, which: str) -> str:
  return f'{figure(number(report["params"].get(which)) / 1e6, 1, limit=1e9)} M'


def task_metrics(values: dict) -> list[str]:
  """The metrics of a task, without their standard errors; 'exact_match,strict' is exact_match by the filter strict."""
  return [metric for metric in values if metric != 'n' and not metric.partition(',')[0].endswith('_stderr')]


def is_fraction(metric: str) -> bool:
  """Whether a metric is a fraction of right answers, which is shown in percent."""
  name = metric.partition(',')[0]
  return name.startswith(('acc', 'exact_match', 'pass@')) or name in ('em', 'f1')


def metric_head(metric: str) -> str:
  name, _, answers = metric.partition(',')
  return name + (f' ({answers})' if answers else '') + (', %' if is_fraction(metric) else '')


def metric_figure(values: dict, metric: str, digits: int = 2) -> str:
  """value ± standard error, as far as there are such; fractions in percent with `digits`, others with two."""
  name, comma, answers = metric.partition(',')
  scale, digits = (100, digits) if is_fraction(metric) else (1, 2)
  value, stderr = (scale * number(values.get(key)) for key in (metric, f'{name}_stderr{comma}{answers}'))
  return figure(value, digits) + ('' if math.isnan(value + stderr) else f' ± {figure(stderr, digits)}')


# ---- report.md ----


def table(report: dict) -> str:
  """Markdown: a row per model, perplexity on each corpus and accuracy in each task, or else the task's first metric."""
  corpora, dense = list(report['ppl']), report['tasks']['dense']
  tasks = {t: 'acc' if 'acc' in names else names[0] for t, v in dense.items() if (names := task_metrics(v))}
  methods = len({row['method'] for row in report['rows']}) > 1
  head = ['model', *(['layers chosen by'] if methods else []), 'layers', *(f'PPL {c}' for c in corpora)]
  head += [f'{t}, %' if metric == 'acc' else f'{t} {metric_head(metric)}' for t, metric in tasks.items()]
  lines = [head, ['---'] * (2 if methods else 1) + ['---:'] * (1 + len(corpora) + len(tasks))]

  def line(name: str, method: str, layers: int, ppl: dict, values: dict):
    figures = [figure(ppl.get(c)) for c in corpora] + [metric_figure(values.get(t, {}), m, 1) for t, m in tasks.items()]
    lines.append([name, *([method] if methods else []), str(layers), *figures])

  line(NAMES['dense'], '', report['num_layers'], {c: report['ppl'][c].get('dense') for c in corpora}, dense)
  methods_in_order = list(dict.fromkeys(row['method'] for row in [report['rows'][-1], *report['rows']]))
  place = lambda row: (len(row['removed']), methods_in_order.index(row['method']), list(NAMES).index(row['recipe']))
  for row in sorted(report['rows'], key=place):
    name = NAMES[row['recipe']] + (' (exported)' if row is report['rows'][-1] else '')
    line(name, row['method'], report['num_layers'] - len(row['removed']), row['ppl'], row['tasks'])
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def verdict(report: dict) -> list[str]:
  """One sentence per corpus on which another way to as few layers was better than the exported one."""
  lines, exported = [], report['rows'][-1]
  rivals = [row for row in report['rows'] if len(row['removed']) == len(exported['removed'])]
  methods = len({row['method'] for row in rivals}) > 1
  name = lambda row: NAMES[row['recipe']] + (f', layers chosen by {row["method"]}' if methods else '')
  for corpus in report['ppl']:

    def ppl(row: dict) -> float:
      value = number(row['ppl'].get(corpus))
      return math.inf if math.isnan(value) else value

    best = min(rivals, key=ppl)
    if ppl(best) < ppl(exported):
      lines.append(
        f'On {corpus}, "{name(best)}" is better than the exported "{name(exported)}": '
        f'{figure(ppl(best))} against {figure(ppl(exported))}.'
      )
  return lines


def plot(report: dict, path: pathlib.Path):
  """Perplexity over the number of layers, a line for each way of choosing and recipe; an SVG."""
  import matplotlib.figure  # here: it is slow to import, and only a sweep needs it

  corpora = list(report['ppl'])
  figure = matplotlib.figure.Figure(figsize=(6 * len(corpora), 4.5), layout='constrained')
  lines: dict[tuple[str, str], list[dict]] = {}
  for row in report['rows']:
    lines.setdefault((row['method'], row['recipe']), []).append(row)
  depth = lambda row: report['num_layers'] - len(row['removed'])
  for corpus, axes in zip(corpora, figure.subplots(1, len(corpora), squeeze=False)[0]):
    for (method, recipe), rows in sorted(lines.items()):
      rows = sorted(rows, key=depth)
      layers = [depth(row) for row in rows] + [report['num_layers']]
      values = [*(row['ppl'].get(corpus) for row in rows), report['ppl'][corpus].get('dense')]
      ppl = [value if (value := number(v)) < 1e100 else math.nan for v in values]  # an axis overflows beyond
      axes.plot(layers, ppl, marker='o', label=f'{method}: {NAMES[recipe]}')
    axes.set(title=corpus, xlabel='layers', ylabel='perplexity', yscale='log')
    axes.legend()
  temporary = path.with_name(f'{path.name}.partial')
  figure.savefig(temporary, format='svg', metadata={'Date': None})
  os.replace(temporary, path)


def markdown(report: dict) -> str:
  fewer = 1 - number(report['params'].get('pruned')) / number(report['params'].get('dense'))
  lines = [
    f'# {report["model"]}: {report["num_layers"]} → {len(report["kept"])} layers',
    '',
    f'Removed (0-based, numbers of the dense model): {report["removed"]}. Kept: {report["kept"]}.',
    f'Parameters: {millions(report, "dense")} → {millions(report, "pruned")} ({figure(100 * fewer, 1)}% fewer).',
    '',
  ]
  if report['ppl'] or report['tasks']['dense']:
    lines += [table(report), '']
  if report['ppl']:
    if len({len(row['removed']) for row in report['rows']}) > 1:
      lines += ['![perplexity over layers](sweep.svg)', '']
    lines += [f'{line}\n' for line in verdict(report)]
    for corpus, about in report['corpora'].items():
      lines.append(
        f'- {corpus}: {about["source"]}, sha256 {about["sha256"][:16]}…, {about["windows"]} windows of '
        f'{about["window"]} tokens, BOS: {about["bos"]}.'
      )
    lines += [f'- Protocol: {next(iter(report["corpora"].values()))["protocol"]}.', '']
  for choice in report['choices']:
    if choice.get('merges'):
      merged = '; '.join(f'{base} ← {", ".join(map(str, members))}' for base, *members in choice['merges'])
      lines += [f'Layers merged by {choice["method"]}, {choice["num_remove"]} fewer: {merged}.', '']
    if choice.get('candidates'):
      judged = '; '.join(
        f'{c["method"]} {sorted(c["removed"])}, {figure(c.get("loss"), 4)}' for c in choice['candidates']
      )
      lines += [f'Loss that each choice of {choice["num_remove"]} layers would leave: {judged}.', '']
  if report['gates']:
    final = report['gates'][-1]
    lines += [
      'Gates at the end of stage 1: ' + ', '.join(f'{l}: {figure(g, 3)}' for l, g in enumerate(final)) + '.',
      '',
    ]
  if unverified := verification(report):
    lines += [unverified, '']
  seconds = ', '.join(f'{stage} {figure(s, 0, limit=1e9)}' for stage, s in report['seconds'].items())
  peak = number(report.get('peak_bytes')) / 2**30
  lines += [
    f'Seconds: {seconds}. Device: {report["device"]}.'
    + ('' if math.isnan(peak) else f' Peak memory of one: {figure(peak)} GiB.'),
    'Versions: ' + ', '.join(f'{k} {v}' for k, v in report['versions'].items()) + '.',
  ]
  return '\n'.join(lines) + '\n'


def verification(report: dict) -> str:
  """A warning where the check of the export in PyTorch could not be made; empty otherwise."""
  why = report.get('verify', {}).get('torch_error')
  return f'**Not verified in PyTorch**: {why}. Read back in JAX it is the pruned model.' if why else ''


def model_card(report: dict, config: dict) -> str:
  """README.md of the exported folder: what was removed, from what, how, with which figures."""
  name = pathlib.PurePath(report['model']).name
  hub_id = not pathlib.Path(report['model']).exists() and report['model'].count('/') == 1
  lines = ['---', 'library_name: transformers', 'tags: [pruned, elder_jax]']
  lines += [f'base_model: {report["model"]}', '---', ''] if hub_id else ['---', '']
  chosen = 'given' if config['remove_layers'] is not None else f'chosen by {report["method"]}'
  if candidates := report['choices'][0].get('candidates'):
    chosen += f' ({candidates[0]["method"]})'
  lines += [
    f'# {name}, {len(report["kept"])} of {report["num_layers"]} layers',
    '',
    f'Made from {report["model"] if hub_id else name} by elder_jax {report["versions"]["elder_jax"]}.',
    f'Removed layers (0-based, numbers of the original): {report["removed"]}. Kept: {report["kept"]}.',
    f'Parameters: {millions(report, "dense")} → {millions(report, "pruned")}.',
    '',
    f'The layers were {chosen}; recipe: `{report["recipe"]}` ({NAMES[report["recipe"]]}).',
  ]
  if report['steps']:
    tokens = report['steps'] * report['tokens_per_step']
    lines.append(f'Trained for {report["steps"]} steps, {tokens:,} tokens, learning rate {config["lr"]:g}.')
  lines += [
    '',
    'An ordinary checkpoint of its architecture with fewer layers: transformers, vLLM and convert_hf_to_gguf.py of '
    'llama.cpp read it as it is. `python -m elder_jax.verify FOLDER` or `sha256sum -c SHA256SUMS` tells whether the files '
    'are those that were written (this page included).',
  ]
  if unverified := verification(report):
    lines += ['', unverified]
  if report['ppl'] or report['tasks']['dense']:
    lines += ['', table(report), '']
    lines += [
      f'- {corpus}: sha256 of the text {about["sha256"][:16]}…, windows of {about["window"]} tokens, BOS: {about["bos"]}, '
      f'{about["protocol"]}.'
      for corpus, about in report['corpora'].items()
    ]
  return '\n'.join(lines) + '\n'
