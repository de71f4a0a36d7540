"""Compares variants of `absorb` on validation text: which matrices it refits, and the ridge constant.

  python -m benchmarks.absorb_variants --model=MODEL --wikitext=FOLDER --news=FILE [--remove_layers=12,13,14,15,16,17,18]

Nothing is trained. Flags, texts and budget are those of benchmarks/results.py. --news gives the second column. To choose
by both columns, give a text that is not a test text, such as Brown's non-press genres.
"""

import pathlib
import time

from absl import app
from absl import flags
from absl import logging
import jax

from benchmarks import one_row
from benchmarks import results
from benchmarks import results_rows
from elder_jax.model import pruning
from elder_jax.recipes import absorb
from elder_jax.recipes import normed
from elder_jax.run import work
from elder_jax.run.config import Config
from elder_jax.run.tables import markdown_table

_REMOVE = flags.DEFINE_string('remove_layers', '12,13,14,15,16,17,18', 'Layers to remove.')

# Name -> (ridge, arguments of absorb).
VARIANTS = {
  'the down projection of the layer before': (0.1, dict(after=0, attention=False)),
  'both projections of it': (0.1, dict(after=0)),
  'and of one layer behind': (0.1, dict(after=1)),
  'and of two': (0.1, dict(after=2)),
  'and of two, ridge 0.3': (0.3, dict(after=2)),
  'and of two, ridge 1': (1.0, dict(after=2)),
  'and of four, ridge 0.3': (0.3, dict(after=4)),
  'and of all, ridge 1': (1.0, dict(after=99)),
}
# Name -> (fraction of the text that each round reads, ridge, arguments of absorb).
NORMED = {
  'one round': ((1.0,), 0.1, dict(after=0)),
  'two': ((1.0, 1.0), 0.1, dict(after=0)),
  'three': ((1.0, 1.0, 1.0), 0.1, dict(after=0)),
  'two, the first on a quarter': ((0.25, 1.0), 0.1, dict(after=0)),
  'the same, ridge 0.02': ((0.25, 1.0), 0.02, dict(after=0)),
  'the same, ridge 0.3': ((0.25, 1.0), 0.3, dict(after=0)),
  'the same, ridge 0.1, two layers behind with 0.3': ((0.25, 1.0), 0.1, dict(after=2)),
}


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  folder = pathlib.Path(flags.FLAGS.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  train, validation = results.split(pathlib.Path(flags.FLAGS.wikitext), folder)
  removed = [int(l) for l in _REMOVE.value.split(',')]
  config = Config.of(
    model=flags.FLAGS.model,
    workdir=str(folder / 'absorb_variants'),
    train_data=train,
    eval_data={'validation': validation, 'second': flags.FLAGS.news},
    remove_layers=removed,
    recipe='absorb',
    compare=(),
    **results_rows.BUDGET,
  )
  run = one_row.begin(config)
  job, rows = run.job, []
  with jax.set_mesh(job.mesh):
    dense = run.dense.get()

    def show(name, model, seconds):
      ppl = work.measure(job, model, name)['ppl']
      rows.append([name, *(f'{v:.2f}' for v in ppl.values()), f'{seconds:.0f}'])

    def absorbed(name, more):
      start = time.monotonic()
      model = absorb.absorb(dense, removed, job.batches[: config.fitted_steps], job.mode, **more)
      show(name, model, time.monotonic() - start)

    show('dense', dense, 0)
    show('removed', pruning.prune(dense, removed), 0)
    if dense.spec.block == 'sandwich':
      for name, (normed.ROUNDS, normed.RIDGE, more) in NORMED.items():
        absorbed(name, more)
    else:
      for name, (absorb.RIDGE, more) in VARIANTS.items():
        absorbed(name, more)
  print(markdown_table(['refitted', 'validation', 'second', 'seconds'], rows))


if __name__ == '__main__':
  app.run(main)
