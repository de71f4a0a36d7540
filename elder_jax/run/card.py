"""The model card: README.md of an exported folder."""

import pathlib

from elder_jax.hf import manifest
from elder_jax.log import write_whole
from elder_jax.recipes import label_of
from elder_jax.run import lineage
from elder_jax.run import usage
from elder_jax.run.caveats import caveats
from elder_jax.run.report import answers_section
from elder_jax.run.report import table
from elder_jax.run.report import verification
from elder_jax.run.tables import figure
from elder_jax.run.tables import markdown_table
from elder_jax.run.tables import millions

TAGS = ['elder_jax', 'pruned', 'depth-pruning']


def write_card(folder: pathlib.Path, report: dict, config: dict):
  """Writes README.md into an exported folder, whose other files are there already."""
  write_whole(folder / manifest.CARD, model_card(report, config, usage.files_of(folder)))


def model_card(report: dict, config: dict, files: usage.Files = usage.NOTHING) -> str:
  """The text of README.md.

  Args:
    report: report.json; what is known at the very end of a run may be missing.
    config: config.json of the run.
    files: what the folder holds.
  """
  name = lineage.original(report.get('lineage') or [])[0] or lineage.public_name(report['model'])
  short = name.rpartition('/')[2]
  kept, total = _kept(report)
  gone, by = total - len(kept), f'elder_jax {report["versions"]["elder_jax"]}'
  lines = [
    '---',
    _front_matter(report, files),
    '---',
    '',
    f'# {short}, {len(kept)} of {total} layers' if gone else f'# {short}',
    '',
    *_warning(report),
    _linked(name) + (f' without {gone} of its {total} layers, made by {by}.' if gone else f', trained by {by}.'),
    '',
    *_how(report, config, kept, total),
    *_sizes(report, files),
    *_figures(report),
    *answers_section(report),
    *usage.section(files),
    '',
    *_licence(report),
    *_files(files),
  ]
  return '\n'.join(lines).rstrip() + '\n'


def _linked(name: str) -> str:
  return f'[{name}](https://huggingface.co/{name})' if lineage.is_hub_id(name) else name


def _kept(report: dict) -> tuple[list[int], int]:
  """(layers that are left by the original's numbers, number of its layers)."""
  steps = report.get('lineage') or []
  total = lineage.original(steps)[1]
  kept = lineage.kept_by(steps, total) if total else None
  return (report['kept'], report['num_layers']) if kept is None else (kept, total)


def _front_matter(report: dict, files: usage.Files) -> str:
  """The metadata of the hub. Of its relations to a base model `finetune` alone fits: the others are adapter, merge and
  quantized."""
  from huggingface_hub import ModelCardData  # here, since it takes a second to import

  origin = report.get('origin') or {}
  relation = {'base_model_relation': 'finetune'} if 'base_model' in origin else {}
  data = ModelCardData(
    base_model=origin.get('base_model'),
    language=origin.get('language'),
    library_name='gguf' if files.gguf else 'transformers',
    license=origin.get('license'),
    license_name=origin.get('license_name'),
    license_link=origin.get('license_link'),
    pipeline_tag=usage.pipeline_tag(files),
    tags=[*TAGS, *(['gguf'] if files.gguf else [])],
    **relation,
  )
  return data.to_yaml()


def _warning(report: dict) -> list[str]:
  sentences = [*caveats(report), *filter(None, [verification(report)])]
  return ['> [!WARNING]', *(f'> {sentence}' for sentence in sentences), ''] if sentences else []


def _how(report: dict, config: dict, kept: list[int], total: int) -> list[str]:
  """What was removed, how, and what was trained."""
  removed = lineage.ranges([l for l in range(total) if l not in kept])
  lines = [
    '## What was done',
    '',
    f'- Removed layers (0-based, numbers of the original): {removed or "none"}. Kept: {lineage.ranges(kept)}.',
  ]
  if report['removed']:
    lines.append(f'- The layers were {_chosen(report, config)}.')
  lines.append(f'- Recipe: `{report["recipe"]}` ({label_of(report["recipe"])}).')
  if report['steps']:
    tokens = report['steps'] * report['tokens_per_step']
    lines.append(f'- Trained for {report["steps"]} steps, {tokens:,} tokens, learning rate {config["lr"]:g}.')
  if len(texts := report.get('train_data') or []) > 1:
    shares = ', '.join(f'{lineage.public_name(t["name"])} {figure(100 * t["weight"], 0)}%' for t in texts)
    lines.append(f'- Training text: {shares}.')
  if len(steps := report.get('lineage') or []) > 1:
    lines += ['', 'In order:', '', *(f'{i + 1}. {lineage.sentence(step)}.' for i, step in enumerate(steps))]
  return [*lines, '']


def _chosen(report: dict, config: dict) -> str:
  if config['remove_layers'] is not None:
    return 'given'
  by = f'chosen by {report["method"]}'
  candidates = report['choices'][0].get('candidates') if report['choices'] else None
  return f'{by} ({candidates[0]["method"]})' if candidates else by


def _sizes(report: dict, files: usage.Files) -> list[str]:
  rows = [
    ['layers', str(report['num_layers']), str(len(report['kept']))],
    ['parameters', millions(report, 'dense'), millions(report, 'pruned')],
  ]
  head = ['', 'before' if report.get('heals') else 'original', 'this model']
  lines = ['## Size', '', markdown_table(head, rows), '']
  if files.sizes:
    types = ', '.join(f'{size / 1e6:,.1f} MB {kind}' for kind, size in sorted(files.sizes.items()))
    lines += [f'Weights on disk: {types}.', '']
  return [
    *lines,
    f'`elder_jax speed --model=ORIGINAL --pruned={files.gguf or "FOLDER"}` measures the speed-up on your device.',
    '',
  ]


def _figures(report: dict) -> list[str]:
  if not (report['ppl'] or report['tasks']['dense']):
    return []
  corpora = [
    f'- {corpus}: sha256 of the text {about["sha256"][:16]}…, windows of {about["window"]} tokens, BOS: {about["bos"]}, '
    f'{about["protocol"]}.'
    for corpus, about in report['corpora'].items()
  ]
  return ['## Figures', '', table(report), '', *corpora, '']


def _licence(report: dict) -> list[str]:
  origin = report.get('origin') or {}
  if 'license' in origin:
    return []
  return ['## Licence', '', 'The source names no licence. That of the original model applies.', '']


def _files(files: usage.Files) -> list[str]:
  kind = 'GGUF file' if files.gguf else 'checkpoint'
  return [
    '## Check the files',
    '',
    f'This is an ordinary {kind} of its architecture with fewer layers. `elder_jax verify FOLDER` or '
    '`sha256sum -c SHA256SUMS` checks that the files are those that were exported. This page is not listed there and may '
    'be edited.',
  ]
