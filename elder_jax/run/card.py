"""The model card: README.md of an exported folder."""

import pathlib

from elder_jax.recipes import label_of
from elder_jax.run import lineage
from elder_jax.run.report import answers_section
from elder_jax.run.report import table
from elder_jax.run.report import verification
from elder_jax.run.tables import figure
from elder_jax.run.tables import millions


def model_card(report: dict, config: dict) -> str:
  """README.md of the exported folder: what was removed, from what, how, with which figures."""
  name = pathlib.PurePath(report['model']).name
  hub_id = lineage.public_name(report['model']) == report['model'] != name
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
    f'The layers were {chosen}; recipe: `{report["recipe"]}` ({label_of(report["recipe"])}).',
  ]
  if report['steps']:
    tokens = report['steps'] * report['tokens_per_step']
    lines.append(f'Trained for {report["steps"]} steps, {tokens:,} tokens, learning rate {config["lr"]:g}.')
    texts = report.get('train_data') or []
    if len(texts) > 1:
      shares = ', '.join(f'{lineage.public_name(t["name"])} {figure(100 * t["weight"], 0)}%' for t in texts)
      lines.append(f'Training text: {shares}.')
  if len(report.get('lineage', [])) > 1:
    lines += ['', 'What was done so far:', *(f'- {lineage.sentence(step)}.' for step in report['lineage'])]
  is_gguf = report.get('format') == 'gguf'
  readers = 'transformers, vLLM and convert_hf_to_gguf.py of llama.cpp read it as it is.'
  checks = '`sha256sum -c SHA256SUMS`' if is_gguf else '`elder_jax verify FOLDER` or `sha256sum -c SHA256SUMS`'
  lines += [
    '',
    f'An ordinary {"file" if is_gguf else "checkpoint"} of its architecture with fewer layers: '
    f'{"llama.cpp and Ollama read it as it is." if is_gguf else readers} {checks} tells whether the files are those that '
    'were written (this page included).',
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
  if section := answers_section(report):
    lines += ['', *section[:-1]]
  return '\n'.join(lines) + '\n'
