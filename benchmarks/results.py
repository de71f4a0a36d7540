"""The rows of docs/results.md: ways of choosing layers × recipes on one model, a row at a time.

  python -m benchmarks.results --model=MODEL --wikitext=FOLDER --news=FILE --workdir=runs/results

FOLDER holds WikiText-2's valid.txt and test.txt. Training sees the first 80% of valid.txt, hyper-parameters are judged on
its rest (the column "validation"), test.txt and FILE give the figures. Rows are kept in benchmarks/results.jsonl and not
done again: the command can be killed and started again, on another machine too. The pages are written at its end, and by
python -m benchmarks.docs. --only=PREFIX does some rows. With --tasks_dir (see benchmarks/tasks.py) some rows are also
evaluated on zero-shot tasks. --part=I/N does every N-th row: several processes can share an accelerator that one of them
does not fill, as benchmarks/results_shared.sh has them do.

Two budgets: a sixteenth of the paper's text, which a CPU can do, and "one pass" over all of the training text, whose rows
are done where there is an accelerator, or where --only asks for them.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import time

from absl import app
from absl import flags
from absl import logging
import jax

from benchmarks import docs
from benchmarks import one_row
from benchmarks import results_rows
from benchmarks import results_table
from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.log import log
from elder_jax.log import write_json
from elder_jax.log import write_whole
from elder_jax.methods import find_method
from elder_jax.model import pruning
from elder_jax.model.matrices import layer_matrices
from elder_jax.model.spec import Spec
from elder_jax.recipes import absorb
from elder_jax.recipes import find_recipe
from elder_jax.recipes import normed
from elder_jax.recipes.context import Choice
from elder_jax.recipes.recipe import Recipe
from elder_jax.recipes.streams import cuts
from elder_jax.run.config import Config
from elder_jax.run.config import defaults
from elder_jax.run.job import Run
from elder_jax.text import zero_shot

_MODEL = flags.DEFINE_string('model', None, 'Model, as for elder_jax.main.', required=True)
_WIKITEXT = flags.DEFINE_string('wikitext', None, "Folder with WikiText-2's valid.txt and test.txt.", required=True)
_NEWS = flags.DEFINE_string('news', None, 'Text of the second corpus, not trained on.', required=True)
_GEMMA = flags.DEFINE_string('gemma', '', 'Gemma 3 270M, for the rows of a second model; empty: no such rows.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/results', 'Where texts and choices of layers are kept.')
_ROWS = flags.DEFINE_string('rows', str(results_table.ROWS), 'Where rows are kept, one a line.')
_ONLY = flags.DEFINE_list('only', [''], 'Rows to do, by the beginnings of their names; empty: all.')
_PART = flags.DEFINE_string(
  'part', '0/1', 'I/N: of the rows, counted from 0, those whose number leaves I when divided by N.'
)
_TASKS_DIR = flags.DEFINE_string('tasks_dir', '', 'Folder of local task files; empty: no zero-shot tasks.')
_TASKS = flags.DEFINE_string('tasks', 'piqa,social_iqa', 'Zero-shot tasks.')
_TASK_LIMIT = flags.DEFINE_integer('task_limit', 0, 'Questions per task; 0: all.')


def split(folder: pathlib.Path, work: pathlib.Path) -> tuple[str, str]:
  """WikiText-2 valid cut in two at a line: (training text, validation text)."""
  text = (folder / 'valid.txt').read_text(encoding='utf-8')
  cut = text.index('\n', int(0.8 * len(text))) + 1
  paths = work / 'train.txt', work / 'validation.txt'
  for path, part in zip(paths, (text[:cut], text[cut:])):
    if not path.exists():
      with locked(work / 'texts.lock'):
        write_whole(path, part)
  return str(paths[0]), str(paths[1])


def file_name(name: str) -> str:
  return name.replace('/', '-').replace(' ', '_') + '.json'


def choose(run: Run, work: pathlib.Path) -> Choice:
  """The layers of a row, by its method on the batches of seed 0; kept for the other rows and depths."""
  config, n = run.job.config, run.job.num_removes[0]
  if not n:
    return Choice([])
  method = config.removal.method[0]
  gemma = config.paths.model == _GEMMA.value
  paper = config.gates.gate == 'output'  # its rows are of one depth: rounds for more layers would be for nothing
  one_pass = config.data.num_sequences != results_rows.BUDGET['num_sequences']
  anew = not find_method(method).nested or gemma or paper
  most = n if anew else 10  # the deepest of the rows
  special = ''.join(f'-{name}' for name, true in (('paper', paper), ('gemma', gemma), ('pass', one_pass)) if true)
  path = work / 'choices' / f'{method}{special}{f"-{n}" if anew else ""}.json'
  path.parent.mkdir(exist_ok=True)
  with locked(path.with_suffix('.lock')):
    if not path.exists():
      start = time.monotonic()
      choice = one_row.choose(run, most, seed=0)
      write_json(path, choice.to_json() | {'seconds': time.monotonic() - start})
  return Choice.from_json(json.loads(path.read_text())).first(n)


@contextlib.contextmanager
def locked(path: pathlib.Path):
  """One process at a time; the lock of a process that ends is free."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def teraflops(run: Run, removed: list[int]) -> float:
  """Multiplications and additions of a recipe with weight matrices, in 1e12; choosing and attention scores apart."""
  config, model = run.job.config, run.dense.get()
  L, spec, recipe = model.num_layers, model.spec, find_recipe(config.removal.recipe)
  per_layer = sum(p.get_value().size / L for p in layer_matrices(model.layers).values())
  head, kept = spec.vocab_size * spec.d_model, L - len(removed)
  tokens, total = config.data.batch_size * config.data.seq_len, 0.0
  if recipe.reads_text:
    total += refitting(recipe, spec, L, removed, per_layer) * tokens * config.steps()
  if config.trains(config.removal.recipe):
    depths = [kept] * config.steps()
    if recipe.removes_last:
      in_turn = config.training.sequential
      depths = [L - (step * len(removed) // config.steps() if in_turn else 0) for step in range(config.steps())]
    total += sum(6 * (depth * per_layer + head) for depth in depths) * tokens
    if config.training.taught:
      heads = 2 * head if config.training.distils else 0
      total += 2 * (L * per_layer + heads) * tokens * config.steps()
  return total / 1e12


def refitting(recipe: Recipe, spec: Spec, L: int, removed: list[int], per_layer: float) -> float:
  """Operations a token: both streams up to the last layer that is refitted, and for each matrix its layer again and the
  sums. Of a recipe that is not absorb, one matrix of D features for each gap.
  """
  absorbs, gaps, kept = recipe.start is absorb.start_absorbed, cuts(L, removed), pruning.kept_layers(L, removed)
  if not gaps:
    return 0.0
  first, end = gaps[0][0], gaps[-1][1]
  refitted = [l for l, _ in gaps]
  if absorbs:
    behind = [kept[kept.index(l) + 1 :][: absorb.AFTER] for l, _ in gaps]
    refitted = sorted({*refitted, *(l for layers in behind for l in layers)})
  top = max(end, refitted[-1] + 1)
  through = top + len([l for l in kept if first <= l < top])
  attended, D, F = spec.num_heads * spec.head_dim, spec.d_model, spec.d_ff
  total = float(through * per_layer)
  for l in refitted:
    if not absorbs:
      features = [D]
    elif spec.block == 'sandwich':
      features = [F] * len(normed.ROUNDS)
    elif spec.block == 'parallel':
      features = [attended + F]
    else:
      features = [attended + F if l in dict(gaps) else attended, F]
    total += sum(per_layer + a * (a + D) for a in features)
  return 2 * total


def config_of(name: str, settings: dict, work: pathlib.Path) -> Config:
  train, validation = split(pathlib.Path(_WIKITEXT.value), work)
  texts = {'validation': validation, 'WikiText-2 test': f'{_WIKITEXT.value}/test.txt', 'news': _NEWS.value}
  settings = {
    'model': _MODEL.value,
    'workdir': str(work / 'rows' / file_name(name).removesuffix('.json')),
    'train_data': train,
    'eval_data': texts,
    'compare': (),
    'checkpoint_every': 0,
    **results_rows.BUDGET,
    **results_rows.START,
    **settings,
  }
  if _TASKS_DIR.value and results_rows.has_tasks(name):
    settings |= dict(
      tasks=tuple(_TASKS.value.split(',')), tasks_dir=_TASKS_DIR.value, task_limit=_TASK_LIMIT.value, eval_batch_size=8
    )
  return Config.of(**settings | {'method': (settings['method'],)})


def changed(config: Config) -> dict:
  """The settings that are not the defaults, as JSON has them; of files only the names, which mean the same elsewhere."""
  default = defaults()
  settings = {k: v for k, v in config.to_json().items() if v != json.loads(json.dumps(default[k])) and k != 'workdir'}
  settings['method'] = ','.join(config.removal.method)  # also where it is the default, which was another one
  settings |= {k: _file(settings[k]) for k in ('model', 'train_data', 'tasks_dir') if k in settings}
  settings['eval_data'] = [f'{k}={_file(v)}' for k, v in config.evaluation.eval_data.items()]
  return settings


def _file(path: str) -> str:
  return pathlib.PurePath(path).name


def same(config: Config, found: dict[str, dict]) -> dict | None:
  """A row that was run with the same settings: the search's best is the final row of its seed."""
  return next((row for row in found.values() if row.get('settings') == changed(config)), None)


def do(config: Config, name: str, work: pathlib.Path) -> dict:
  run = one_row.begin(config)
  choice = choose(run, work)
  operations = teraflops(run, choice.removed)
  start = time.monotonic()
  return {
    'settings': changed(config),
    **one_row.figures(run, choice, config.removal.recipe, name),
    'removed': sorted(choice.removed),
    'candidates': choice.about.get('candidates', []),  # of auto
    'teraflops': operations,
    'seconds': time.monotonic() - start,
    'device': device_name(),
    'versions': package_versions(),
  }


def append(path: pathlib.Path, row: dict, work: pathlib.Path):
  """A line more, whole or not at all."""
  temporary = path.with_name(f'{path.name}.partial')
  with locked(work / f'{path.name}.lock'):
    before = path.read_text(encoding='utf-8') if path.exists() else ''
    temporary.write_text(f'{before}{json.dumps(row)}\n', encoding='utf-8')
    os.replace(temporary, path)


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  part, parts = map(int, _PART.value.split('/'))
  work = pathlib.Path(_WORKDIR.value)
  work.mkdir(parents=True, exist_ok=True)
  kept = pathlib.Path(_ROWS.value)
  if _TASKS_DIR.value:  # now, and not at the first row that has tasks
    zero_shot.load_tasks(_TASKS.value.split(','), _TASKS_DIR.value)
  found = results_table.read(kept)
  one_pass = jax.default_backend() != 'cpu' or any(only.startswith(results_rows.PASS) for only in _ONLY.value)
  for i, (name, settings) in enumerate(results_rows.rows(found, _GEMMA.value, one_pass)):
    asked = i % parts == part and name.startswith(tuple(_ONLY.value))
    if asked and not results_table.kept_name(name, found):
      log(f'row {name}')
      config = config_of(name, settings, work)
      found[name] = same(config, found) or do(config, name, work)
      append(kept, {'name': name, **found[name]}, work)
      jax.clear_caches()
      log(f'{name}: {found[name]["ppl"]}')
  if parts == 1 and kept.resolve() == results_table.ROWS.resolve():  # else the others' rows are not here
    docs.write()


if __name__ == '__main__':
  app.run(main)
