"""The results table, docs/results.md: every option of the method on one model, a row at a time.

  python -m benchmarks.results --model=MODEL --wikitext=FOLDER --news=FILE --workdir=runs/results --out=docs/results.md

FOLDER holds WikiText-2's valid.txt and test.txt. Training sees the first 80% of valid.txt, hyper-parameters are judged on
its rest (the column "validation"), test.txt and FILE give the figures. A row that is done is not done again: the command
can be killed and started again. --only=PREFIX does some rows, --table writes the document from the rows that are there.
"""

import dataclasses
import json
import pathlib
import statistics
import time

from absl import app
from absl import flags
from absl import logging
import jax

from elder_jax import metrics
from elder_jax import pipeline
from elder_jax import report as report_lib
from elder_jax.config import Config

_MODEL = flags.DEFINE_string('model', None, 'Model, as for elder_jax.main.', required=True)
_WIKITEXT = flags.DEFINE_string('wikitext', None, "Folder with WikiText-2's valid.txt and test.txt.", required=True)
_NEWS = flags.DEFINE_string('news', None, 'Text of the second corpus, not trained on.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', 'runs/results', 'Where rows are kept.')
_OUT = flags.DEFINE_string('out', 'docs/results.md', 'The document; its part between the two marks is replaced.')
_ONLY = flags.DEFINE_string('only', '', 'Rows to do, by the beginning of their names; empty: all.')
_TABLE = flags.DEFINE_boolean('table', False, 'Only write the document.')

BEGIN, END = '<!-- results: begin -->\n', '<!-- results: end -->\n'
BLOCK = (
  '12,13,14,15,16,17,18'  # LLM-Streamline's choice here: rows on stage 2 use it, so that choice and training are apart
)
BUDGET = dict(
    seq_len=256, num_sequences=64, batch_size=4, train_steps=16, num_remove=7, eval_seq_len=512, eval_tokens=6144
)  # fmt: skip
# What a row has where its name does not say otherwise; written out, so that the rows do not follow the defaults about.
START = dict(gate='residual', selection='iterative', gate_lr=0.02, gate_steps=4, lambda2=1e-3, order='joint', lr=1e-4)

# λ2 by norm and scale, so that the penalty starts at about 0.6 per layer: ten times what the paper's 1e-3 gives for l2
# per token, where the penalty is too weak to be told from none.
LAMBDA2 = {
    ('l2', 'token'): 1e-2, ('l2', 'relative'): 3.0, ('l2', 'none'): 3e-4,
    ('l1', 'token'): 5e-4, ('l1', 'relative'): 3.0, ('l1', 'none'): 5e-7,
}  # fmt: skip


def rows() -> dict[str, dict]:
  """Row name -> settings that differ from BUDGET. The order is that of running."""
  rows = {'dense': dict(remove_layers='', recipe='none')}
  fixed = dict(remove_layers=BLOCK)
  rows['stage2/direct removal'] = dict(fixed, recipe='none')
  for lr in (1e-4, 3e-4):
    rows[f'stage2/prune_then_train lr {lr:g}'] = dict(fixed, recipe='prune_then_train', lr=lr)
  for penalty, scale in (('l2', 'token'), ('l2', 'relative'), ('l2', 'none')):
    rows[f'stage2/{penalty} {scale} {LAMBDA2[penalty, scale]:g} lr 0.0001'] = dict(
      fixed, penalty=penalty, penalty_scale=scale, lambda2=LAMBDA2[penalty, scale], lr=1e-4
    )
  for (penalty, scale), lambda2 in LAMBDA2.items():
    rows[f'stage2/{penalty} {scale} {lambda2:g} lr 0.0003'] = dict(
      fixed, penalty=penalty, penalty_scale=scale, lambda2=lambda2, lr=3e-4
    )
  rows['stage2/l2 token 0.01 lr 0.0003 sequential'] = dict(fixed, lambda2=1e-2, lr=3e-4, order='sequential')
  rows['stage2/l2 token 0.001 lr 0.0003'] = dict(fixed, lambda2=1e-3, lr=3e-4)
  rows['stage2/l2 token 0.001 lr 0.0003 sequential'] = dict(fixed, lambda2=1e-3, lr=3e-4, order='sequential')
  for gate, lrs in (('residual', (0.002, 0.005, 0.02, 0.1)), ('output', (0.005, 0.02, 0.1))):
    for lr in lrs:
      stage1 = dict(recipe='none', gate=gate, gate_lr=lr, dtype='bfloat16')
      rows[f'stage1/{gate} one_shot lr {lr:g}'] = dict(stage1, selection='one_shot', gate_steps=28)
      rows[f'stage1/{gate} iterative lr {lr:g}'] = dict(stage1, gate_steps=4)
  rows |= final_rows()
  rows['stage2/l2 token 0.1 lr 0.0003'] = dict(fixed, lambda2=0.1, lr=3e-4)
  rows['stage2/l2 token 0.01 lr 0.0003 all trained'] = dict(fixed, lambda2=1e-2, lr=3e-4, trainable='all')
  rows['stage2/l2 token 0.1 lr 0.0003 ramp 2'] = dict(fixed, lambda2=0.1, lr=3e-4, lambda2_power=2.0)
  rows['stage2/l2 token 0.001 lr 0.0003 sequential, all trained'] = dict(
    fixed, lambda2=1e-3, lr=3e-4, order='sequential', trainable='all'
  )
  return rows


def final_rows() -> dict[str, dict]:
  """The whole method as chosen from the rows above by validation text, and prune-then-train, on the layers of seed 0."""
  rows, first = {}, 'final/regularize, seed 0'
  for seed in (0, 1, 2):
    chosen = dict(FINAL, seed=seed, lr=3e-4)
    rows[f'final/regularize, seed {seed}'] = chosen if seed == 0 else dict(chosen, same_layers=first)
    rows[f'final/prune_then_train, seed {seed}'] = dict(chosen, recipe='prune_then_train', same_layers=first)
  rows['final/direct removal'] = dict(recipe='none', same_layers=first)
  return rows


FINAL = dict(selection='one_shot', gate_steps=28, gate_lr=0.005, lambda2=1e-3, order='sequential')


def split(folder: pathlib.Path, work: pathlib.Path) -> tuple[str, str]:
  """WikiText-2 valid cut in two at a line: (training text, validation text)."""
  text = (folder / 'valid.txt').read_text(encoding='utf-8')
  cut = text.index('\n', int(0.8 * len(text))) + 1
  paths = work / 'train.txt', work / 'validation.txt'
  for path, part in zip(paths, (text[:cut], text[cut:])):
    path.write_text(part, encoding='utf-8')
  return str(paths[0]), str(paths[1])


def do(name: str, settings: dict, work: pathlib.Path, done: dict[str, dict]) -> dict:
  settings = dict(settings)
  if like := settings.pop('same_layers', None):
    settings['remove_layers'] = ','.join(str(l) for l in done[like]['removed'])
  train, validation = split(pathlib.Path(_WIKITEXT.value), work)
  texts = {'validation': validation, 'WikiText-2 test': f'{_WIKITEXT.value}/test.txt', 'news': _NEWS.value}
  settings = {
      'model': _MODEL.value, 'workdir': str(work / 'rows' / name.replace('/', '-').replace(' ', '_')),
      'train_data': train, 'eval_data': tuple(f'{k}={v}' for k, v in texts.items()), 'compare': [],
      'checkpoint_every': 0, **BUDGET, **START, **settings,
  }  # fmt: skip
  config = Config(**settings)
  job = pipeline.prepare(config)
  model = pipeline.load(job)
  start = time.monotonic()
  choice = pipeline.choose_layers(job, model)
  chosen_in = time.monotonic() - start
  pruned = pipeline.apply_recipe(job, model, choice['chosen'], config.recipe)
  return {
    'settings': {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(Config, k, None)},
    'ppl': pipeline.perplexities(job, pruned, name),
    'removed': sorted(choice['chosen']),
    'gates': choice['gates'],
    'seconds': {'stage1': chosen_in, 'all': time.monotonic() - start},
    'device': report_lib.device(),
    'versions': report_lib.versions(),
  }


def table(done: dict[str, dict]) -> str:
  corpora = list(done['dense']['ppl'])
  lines = ['| row | removed | ' + ' | '.join(corpora) + ' |', '|---|---|' + '---:|' * len(corpora)]
  for name, row in done.items():
    removed = ', '.join(str(l) for l in row['removed'])
    lines.append(f'| {name} | {removed} | ' + ' | '.join(f'{row["ppl"][c]:.2f}' for c in corpora) + ' |')
  groups: dict[str, list[dict]] = {}
  for name, row in done.items():
    if ', seed ' in name:
      groups.setdefault(name.split(', seed ')[0], []).append(row)
  for name, members in groups.items():
    cells = []
    for corpus in corpora:
      values = [row['ppl'][corpus] for row in members]
      spread = statistics.stdev(values) if len(values) > 1 else float('nan')
      cells.append(f'{statistics.mean(values):.2f} ± {spread:.2f}')
    lines.append(f'| **{name}, {len(members)} seeds, mean ± s.d.** | | ' + ' | '.join(cells) + ' |')
  versions = done['dense']['versions']
  about = ', '.join(f'{k} {v}' for k, v in versions.items() if k in ('python', 'jax', 'flax', 'optax'))
  lines.append(
    f'\nDevice: {done["dense"]["device"]}; {about}. Budget: {", ".join(f"{k}={v}" for k, v in BUDGET.items())}.'
  )
  return '\n'.join(lines) + '\n'


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  work = pathlib.Path(_WORKDIR.value)
  work.mkdir(parents=True, exist_ok=True)
  done = {}
  for name, settings in rows().items():
    path = work / (name.replace('/', '-').replace(' ', '_') + '.json')
    if not path.exists() and not _TABLE.value and name.startswith(_ONLY.value):
      metrics.say(f'row {name}')
      report_lib.write_json(path, do(name, settings, work, done))
      jax.clear_caches()
    if path.exists():
      done[name] = json.loads(path.read_text())
      metrics.say(f'{name}: {done[name]["ppl"]}')
  out = pathlib.Path(_OUT.value)
  text = out.read_text() if out.exists() else BEGIN + END
  head, tail = text.split(BEGIN)[0], text.split(END)[1]
  out.write_text(head + BEGIN + table(done) + END + tail)


if __name__ == '__main__':
  app.run(main)
