"""Makes the rows of docs/results.md: methods × recipes on one model, row by row.

  python -m benchmarks.results --model=MODEL --wikitext=FOLDER --news=FILE --workdir=runs/results

FOLDER holds WikiText-2's valid.txt and test.txt. The first 80% of valid.txt is training text. The rest is the validation
text, on which hyper-parameters are chosen. The reported figures are from test.txt and FILE.

Rows are saved in benchmarks/results.jsonl and not repeated, so the command can be killed and rerun, also on another
machine. The pages are written at the end, and by python -m benchmarks.docs. --only=PREFIX makes some rows. With --tasks_dir
(see benchmarks/tasks.py) some rows are also evaluated on zero-shot tasks. --part=I/N makes every N-th row, so that several
processes can share an accelerator (benchmarks/results_shared.sh).

There are two budgets: a sixteenth of the paper's text, which is feasible on a CPU, and "one pass" over the training text.
Rows of one pass are made if there is an accelerator, or if --only names them.
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

_MODEL = flags.DEFINE_string('model', None, 'The model, as --model of elder_jax.', required=True)
_WIKITEXT = flags.DEFINE_string('wikitext', None, "Folder with WikiText-2's valid.txt and test.txt.", required=True)
_NEWS = flags.DEFINE_string('news', None, 'Text of the second corpus, not trained on.', required=True)
_GEMMA = flags.DEFINE_string('gemma', '', 'Gemma 3 270M, for the rows of a second model; empty: no such rows.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/results', 'Folder for texts and choices of layers.')
_ROWS = flags.DEFINE_string('rows', str(results_table.ROWS), 'File that rows are saved in, one per line.')
_ONLY = flags.DEFINE_list('only', [''], 'Prefixes of the names of rows to make; empty: all.')
_PART = flags.DEFINE_string('part', '0/1', 'I/N: make the rows whose 0-based number is I modulo N.')
_TASKS_DIR = flags.DEFINE_string('tasks_dir', '', 'Folder of local task files; empty: no zero-shot tasks.')
_TASKS = flags.DEFINE_string('tasks', 'piqa,social_iqa', 'Zero-shot tasks.')
_TASK_LIMIT = flags.DEFINE_integer('task_limit', 0, 'Questions per task; 0: all.')


def split(folder: pathlib.Path, work: pathlib.Path) -> tuple[str, str]:
  """Splits WikiText-2 valid at a line into (training text, validation text); returns their paths."""
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
  """The layers of a row, chosen by its method on the batches of seed 0, and saved for other rows and depths."""
  config, n = run.job.config, run.job.num_removes[0]
  if not n:
    return Choice([])
  method = config.removal.method[0]
  gemma = config.paths.model == _GEMMA.value
  paper = config.gates.gate == 'output'  # its rows have one depth, so rounds for more layers would be wasted
  one_pass = config.data.num_sequences != results_rows.BUDGET['num_sequences']
  anew = not find_method(method).nested or gemma or paper
  most = n if anew else 10  # the most layers that a row removes
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
  """Lets one process at a time in. The lock is released when its process ends."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def teraflops(run: Run, removed: list[int]) -> float:
  """Multiply and add operations of a recipe with weight matrices, in 1e12, without choosing and attention scores."""
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
  """Operations per token of refitting.

  Both residual streams run up to the last refitted layer. For each refitted matrix, its layer runs again and the sums are
  accumulated. Recipes other than absorb refit one matrix of D features per gap.
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
  """The settings that differ from the defaults, as in JSON. Of files only the names, which other machines share."""
  default = defaults()
  settings = {k: v for k, v in config.to_json().items() if v != json.loads(json.dumps(default[k])) and k != 'workdir'}
  settings['method'] = ','.join(config.removal.method)  # even if it is the default, which has changed
  settings |= {k: _file(settings[k]) for k in ('model', 'train_data', 'tasks_dir') if k in settings}
  settings['eval_data'] = [f'{k}={_file(v)}' for k, v in config.evaluation.eval_data.items()]
  return settings


def _file(path: str) -> str:
  return pathlib.PurePath(path).name


def same(config: Config, found: dict[str, dict]) -> dict | None:
  """A finished row with the same settings, or None: the best row of the search is the final row of its seed."""
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
    'candidates': choice.about.get('candidates', []),  # of the method auto
    'teraflops': operations,
    'seconds': time.monotonic() - start,
    'device': device_name(),
    'versions': package_versions(),
  }


def append(path: pathlib.Path, row: dict, work: pathlib.Path):
  """Appends a line atomically."""
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
  if _TASKS_DIR.value:  # fail now, not at the first row that has tasks
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
  if parts == 1 and kept.resolve() == results_table.ROWS.resolve():  # otherwise rows of other parts are missing
    docs.write()


if __name__ == '__main__':
  app.run(main)
