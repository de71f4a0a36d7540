"""The constants of `absorb` before a norm (Gemma): its rounds and its ridge, judged on validation text.

  python -m benchmarks.absorb_rounds --model=GEMMA --wikitext=FOLDER --news=FILE [--remove_layers=14,15,16,17]

Nothing is trained. Flags, texts and budget are those of benchmarks/results.py; news is shown, not chosen by.
"""

import pathlib

from absl import app
from absl import flags
from absl import logging

from benchmarks import one_row
from benchmarks import results
from benchmarks import results_rows
from elder_jax.recipes import normed
from elder_jax.recipes.context import Choice
from elder_jax.run.config import Config

_REMOVE = flags.DEFINE_string('remove_layers', '14,15,16,17', 'The layers that go.')

ROUNDS = {'one round': (1.0,), 'two': (1.0, 1.0), 'three': (1.0, 1.0, 1.0), 'two, the first on a quarter': (0.25, 1.0)}
RIDGES = (0.02, 0.1, 0.3)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  work = pathlib.Path(flags.FLAGS.workdir)
  work.mkdir(parents=True, exist_ok=True)
  train, validation = results.split(pathlib.Path(flags.FLAGS.wikitext), work)
  removed = [int(l) for l in _REMOVE.value.split(',')]
  run = one_row.begin(
    Config.of(
      model=flags.FLAGS.model,
      workdir=str(work / 'absorb_rounds'),
      train_data=train,
      eval_data={'validation': validation, 'news': flags.FLAGS.news},
      remove_layers=removed,
      recipe='absorb',
      compare=(),
      **results_rows.BUDGET,
    )
  )
  choice = Choice(removed)
  variants = {name: (rounds, normed.RIDGE) for name, rounds in ROUNDS.items()}
  variants |= {f'as is, ridge {ridge}': (normed.ROUNDS, ridge) for ridge in RIDGES if ridge != normed.RIDGE}
  said = [f'removed: {one_row.figures(run, choice, "none", "removed")["ppl"]}']
  for name, (normed.ROUNDS, normed.RIDGE) in variants.items():
    said.append(f'{name}: {one_row.figures(run, choice, "absorb", name)["ppl"]}')
  print('\n'.join(said))


if __name__ == '__main__':
  app.run(main)
