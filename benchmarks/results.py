"""The results table, docs/results.md: ways of choosing layers × recipes on one model, a row at a time.

  python -m benchmarks.results --model=MODEL --wikitext=FOLDER --news=FILE --workdir=runs/results --out=docs/results.md

FOLDER holds WikiText-2's valid.txt and test.txt. Training sees the first 80% of valid.txt, hyper-parameters are judged on
its rest (the column "validation"), test.txt and FILE give the figures. Rows are kept in docs/results.jsonl and not done
again: the command can be killed and started again, on another machine too. --only=PREFIX does some rows, --table writes
the document from the rows that are there. With --tasks_dir (see benchmarks/tasks.py) some rows are also evaluated on
zero-shot tasks. --part=I/N does every N-th row: several processes can share an accelerator that one of them does not
fill; run without it afterwards, for rows that had to wait for others and for the document.

Two budgets: "one pass", over all of the training text and meant for an accelerator, and a sixteenth of the paper's text,
which a CPU can do.
"""

import collections
from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import statistics
import time

from absl import app
from absl import flags
from absl import logging
import jax
import numpy as np

from elder_jax import absorb
from elder_jax import metrics
from elder_jax import pipeline
from elder_jax import prune
from elder_jax import report as report_lib
from elder_jax import zero_shot
from elder_jax.config import METHODS
from elder_jax.config import TRAINED
from elder_jax.config import Config

_MODEL = flags.DEFINE_string('model', None, 'Model, as for elder_jax.main.', required=True)
_WIKITEXT = flags.DEFINE_string('wikitext', None, "Folder with WikiText-2's valid.txt and test.txt.", required=True)
_NEWS = flags.DEFINE_string('news', None, 'Text of the second corpus, not trained on.', required=True)
_GEMMA = flags.DEFINE_string('gemma', '', 'Gemma 3 270M, for the rows of a second model; empty: no such rows.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/results', 'Where texts and choices of layers are kept.')
_ROWS = flags.DEFINE_string('rows', 'docs/results.jsonl', 'Where rows are kept, one a line.')
_OUT = flags.DEFINE_string('out', 'docs/results.md', 'The document; its part between the two marks is replaced.')
_ONLY = flags.DEFINE_list('only', [''], 'Rows to do, by the beginnings of their names; empty: all.')
_PART = flags.DEFINE_string(
  'part', '0/1', 'I/N: of the rows, counted from 0, those whose number leaves I when divided by N.'
)
_TABLE = flags.DEFINE_boolean('table', False, 'Only write the document.')
_TASKS_DIR = flags.DEFINE_string('tasks_dir', '', 'Folder of local task files; empty: no zero-shot tasks.')
_TASKS = flags.DEFINE_string('tasks', 'piqa,social_iqa', 'Zero-shot tasks.')
_TASK_LIMIT = flags.DEFINE_integer('task_limit', 0, 'Questions per task; 0: all.')

BEGIN, END = '<!-- results: begin -->\n', '<!-- results: end -->\n'
BUDGET = dict(
    seq_len=256, num_sequences=64, batch_size=4, train_steps=16, score_steps=4, eval_seq_len=512, eval_tokens=6144
)  # fmt: skip
# What a row has where its name does not say otherwise; written out, so that the rows do not follow the defaults about.
START = dict(
    gate='residual', selection='one_shot', gate_lr=0.005, gate_steps=28, lambda2=1e-3, order='sequential', lr=3e-4
)  # fmt: skip
# The paper's own setting (ELDeR, arXiv 2505.18232), its number of steps apart.
PAPER = dict(gate='output', selection='iterative', gate_lr=0.02, gate_steps=4, lambda2=1e-3, order='joint', lr=1e-4)
# All of the training text once; tokens of texts and batches of scorers that a GPU takes seconds for.
PASS = 'one pass'
PASS_BUDGET = dict(
    seq_len=512, num_sequences=400, batch_size=4, train_steps=100, score_steps=16, eval_seq_len=2048, eval_tokens=0,
    dtype='bfloat16',
)  # fmt: skip
PASS_START = dict(gate_steps=100)  # gates see what training sees
PASS_PAPER = dict(gate_steps=14)  # the same for seven rounds
LEARNING_RATES = (1e-4, 3e-4, 6e-4)
# The best of them on validation text, by recipe: see the rows search/….
BEST_LR = dict(prune_then_train=6e-4, absorb_then_train=3e-4, replace_linear_then_train=6e-4, regularize=6e-4)
GEMMA = 'Gemma 3 270M'
# Of Gemma the same, the rows Gemma 3 270M, search/…; of SmolLM2's rates the lowest was the best there, hence a lower one.
GEMMA_RATES = (3e-5, 1e-4, 3e-4)
GEMMA_LR = dict(prune_then_train=1e-4, absorb_then_train=3e-5, regularize=1e-4)
GEMMA_CHOICE = 'sleb'  # the best on validation text of the rows Gemma 3 270M/…
CHOICE = 'cosine_block'  # of the rows in which recipes are compared


def rows(found: dict[str, dict]) -> Iterator[tuple[str, dict]]:
  """Pairs of a row's name and its settings that differ from START and, but for one pass, from BUDGET; in the order of
  running. Rows whose learning rate is searched for follow when the rows of the search have been `found`."""
  yield from small_rows().items()
  if _GEMMA.value or _TABLE.value:
    yield from gemma_rows().items()
  yield from ((name, PASS_BUDGET | settings) for name, settings in pass_rows(found))


def pass_rows(found: dict[str, dict]) -> Iterator[tuple[str, dict]]:
  """As `rows`; of the second budget."""
  ready = lambda rows: ((f'{PASS}/{name}', PASS_START | how) for name, how in rows.items())
  seven = dict(method=CHOICE, num_remove=7)
  how = {
      'prune_then_train': {}, 'absorb_then_train': {}, 'replace_linear_then_train': {}, 'regularize': {},
      # The gates annealed instead of the penalty.
      'regularize, annealed': dict(lambda2=0.0, order='joint', anneal=0.3),
      'prune_then_train, distilled': dict(distill=0.5), 'absorb_then_train, distilled': dict(distill=0.5),
  }  # fmt: skip
  how = {name: dict(recipe=name.split(', ')[0], **more) for name, more in how.items()}
  yield from ready({'final/dense': dict(method=CHOICE, num_remove=0, recipe='none')})
  yield from ready(
    {f'search/{name}, lr {lr:g}': seven | more | dict(lr=lr) for lr in LEARNING_RATES for name, more in how.items()}
  )
  rates = {name: best_rate(found, f'{PASS}/search/{name}') for name in how}
  ready_at_rate = None not in rates.values()
  if ready_at_rate:
    yield from ready(final_rows(how, rates))
  yield from ready(untrained_rows((7,)))
  if ready_at_rate:
    yield from ready(other_choices(how, rates))
  paper = dict(num_remove=7, recipe='regularize', method='elder', **PAPER | PASS_PAPER)
  yield from ready({"paper/regularize, the paper's settings": paper})
  yield from ready(untrained_rows((4, 10)))


def final_rows(how: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
  """Recipe -> settings and recipe -> rate give the rows of three seeds."""
  # The multiply-adds that absorbing takes, given to the rival as more training on the same text.
  more_steps = dict(**how['prune_then_train'], train_steps=150)
  how = how | {'prune_then_train, half as many steps more': more_steps}
  rates = rates | {'prune_then_train, half as many steps more': rates['prune_then_train']}
  return {
    f'final/{name}, seed {seed}': dict(method=CHOICE, num_remove=7, lr=rates[name], seed=seed, **more)
    for seed in (0, 1, 2)
    for name, more in how.items()
  }


def other_choices(how: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
  """As `final_rows`: at other depths, and with the layers that other methods choose."""
  two = ('prune_then_train', 'absorb_then_train')
  four = (*two, 'replace_linear_then_train', 'regularize')
  choices = (
    (4, CHOICE, four),
    (10, CHOICE, four),
    (10, 'sleb', two),
    *((7, m, two) for m in ('elder', 'sleb', 'taylor')),
  )
  return {
    f'other choices/{n} layers by {method}, {name}, seed {seed}': dict(
      method=method, num_remove=n, lr=rates[name], seed=seed, **how[name]
    )
    for seed in (0, 1, 2)
    for n, method, recipes in choices
    for name in recipes
  }


def best_rate(found: dict[str, dict], prefix: str) -> float | None:
  """Of the rows 'PREFIX, lr …' the rate with the lowest perplexity on validation text; None where one is missing."""
  rows = {lr: found.get(f'{prefix}, lr {lr:g}') for lr in LEARNING_RATES}
  return None if None in rows.values() else min(rows, key=lambda lr: rows[lr]['ppl']['validation'])


def untrained_rows(depths: tuple[int, ...]) -> dict[str, dict]:
  rows = {}
  for n in depths:
    for method in METHODS:
      rows[f'untrained/{n} layers/{method}'] = dict(method=method, num_remove=n, recipe='none')
    for recipe in ('absorb', 'replace_linear'):
      for method in (CHOICE, 'elder', 'sleb'):
        rows[f'untrained/{n} layers/{method}, {recipe}'] = dict(method=method, num_remove=n, recipe=recipe)
  return rows


def small_rows() -> dict[str, dict]:
  """As `rows`; of the first budget, on SmolLM2."""
  rows = {'dense': dict(method=CHOICE, num_remove=0, recipe='none')}
  seven = dict(method=CHOICE, num_remove=7)
  rivals = ('prune_then_train', 'absorb_then_train', 'replace_linear_then_train', 'regularize')
  for recipe in rivals:
    for lr in LEARNING_RATES:
      rows[f'search/{recipe}, lr {lr:g}'] = dict(seven, recipe=recipe, lr=lr)
  final = lambda name, seed, **more: rows.update({f'final/{name}, seed {seed}': dict(seven, seed=seed, **more)})
  for seed in (0, 1, 2):
    for recipe in rivals[:2]:
      final(recipe, seed, recipe=recipe, lr=BEST_LR[recipe])
    final('prune_then_train, lr 0.0003', seed, recipe='prune_then_train', lr=3e-4)
  for seed in (0, 1, 2):
    for recipe in rivals[:2]:
      final(f'{recipe}, distilled', seed, recipe=recipe, lr=3e-4, distill=0.5)
    final('prune_then_train, distilled, lr 0.0006', seed, recipe='prune_then_train', lr=6e-4, distill=0.5)
  for seed in (0, 1, 2):
    # The multiply-adds that absorbing takes, given to the rival as more training on the same text.
    final('prune_then_train, half as many steps more', seed, recipe='prune_then_train', lr=3e-4, train_steps=24)
    final(rivals[2], seed, recipe=rivals[2], lr=BEST_LR[rivals[2]])
    final('replace_linear_then_train, lr 0.0003', seed, recipe=rivals[2], lr=3e-4)
    final(rivals[3], seed, recipe=rivals[3], lr=BEST_LR[rivals[3]])
  rows |= untrained_rows((7, 4, 10))
  for seed in (0, 1, 2):
    for n in (4, 10):
      for recipe in rivals:
        how = dict(method=CHOICE, num_remove=n, recipe=recipe, lr=BEST_LR[recipe], seed=seed)
        rows[f'other depths/{n} layers, {recipe}, seed {seed}'] = how
    for recipe in rivals[:2]:  # where long runs of layers are a bad choice
      how = dict(method='sleb', num_remove=10, recipe=recipe, lr=BEST_LR[recipe], seed=seed)
      rows[f'other depths/10 layers, chosen by sleb, {recipe}, seed {seed}'] = how
    for method in ('elder', 'sleb', 'taylor'):
      for recipe in rivals[:2]:
        how = dict(method=method, num_remove=7, recipe=recipe, lr=BEST_LR[recipe], seed=seed)
        rows[f'other choices/{method}, {recipe}, seed {seed}'] = how
  annealed = dict(seven, recipe='regularize', lambda2=0.0, order='joint')
  rows['ideas/regularize, gates annealed over 60% of the steps'] = dict(annealed, anneal=0.6)
  rows['ideas/regularize, gates annealed over 30% of the steps'] = dict(annealed, anneal=0.3)
  rows["paper/regularize, the paper's settings"] = dict(num_remove=7, recipe='regularize', method='elder', **PAPER)
  return rows


def gemma_rows() -> dict[str, dict]:
  """4 of 18 layers. Recipes are compared on the choice that is best on validation text without training."""
  four = dict(model=_GEMMA.value, num_remove=4)
  recipes = dict(
    prune_then_train={},
    absorb_then_train={},
    # The gates annealed, which did better than the penalty above.
    regularize=dict(lambda2=0.0, order='joint', anneal=0.3),
  )
  rows = {f'{GEMMA}/dense': four | dict(method=CHOICE, num_remove=0, recipe='none')}
  for method in METHODS:
    rows[f'{GEMMA}/{method}'] = four | dict(method=method, recipe='none')
  for method in (CHOICE, GEMMA_CHOICE):
    rows[f'{GEMMA}/{method}, absorb'] = four | dict(method=method, recipe='absorb')
  four['method'] = GEMMA_CHOICE
  for lr in GEMMA_RATES:
    for recipe, more in recipes.items():
      rows[f'{GEMMA}, search/{recipe}, lr {lr:g}'] = four | dict(recipe=recipe, lr=lr, **more)
  for seed in (0, 1, 2):
    for recipe, more in recipes.items():
      how = four | dict(recipe=recipe, lr=GEMMA_LR[recipe], seed=seed, **more)
      rows[f'{GEMMA}/{recipe}, seed {seed}'] = how
      if recipe != 'regularize':
        rows[f'{GEMMA}/{recipe}, distilled, seed {seed}'] = how | dict(distill=0.5)
    # The multiply-adds that absorbing takes, given to the rival.
    more_steps = four | dict(recipe='prune_then_train', lr=GEMMA_LR['prune_then_train'], seed=seed, train_steps=28)
    rows[f'{GEMMA}/prune_then_train, three quarters as many steps more, seed {seed}'] = more_steps
  return rows


def has_tasks(name: str) -> bool:
  untrained = [f'untrained/7 layers/{CHOICE}{recipe}' for recipe in ('', ', absorb', ', replace_linear')]
  recipes = ('prune_then_train', 'absorb_then_train')
  trained = [f'{recipe}{more}, seed 0' for recipe in recipes for more in ('', ', distilled')]
  gemma = [f'{GEMMA}/{row}' for row in ('dense', GEMMA_CHOICE, f'{GEMMA_CHOICE}, absorb', *trained)]
  small = ('dense', *untrained, *(f'final/{row}' for row in trained))
  one_pass = [f'{PASS}/{row}' for row in ('final/dense', *small[1:])]
  return name in (*small, *one_pass, *gemma)


def split(folder: pathlib.Path, work: pathlib.Path) -> tuple[str, str]:
  """WikiText-2 valid cut in two at a line: (training text, validation text)."""
  text = (folder / 'valid.txt').read_text(encoding='utf-8')
  cut = text.index('\n', int(0.8 * len(text))) + 1
  paths = work / 'train.txt', work / 'validation.txt'
  for path, part in zip(paths, (text[:cut], text[cut:])):
    if not path.exists():
      with locked(work / 'texts.lock'):
        metrics.write_whole(path, part)
  return str(paths[0]), str(paths[1])


def file_name(name: str) -> str:
  return name.replace('/', '-').replace(' ', '_') + '.json'


def choose(job, model, work: pathlib.Path) -> dict:
  """The layers of a row, by its method on the batches of seed 0; kept for the other rows and depths."""
  config, n = job.config, job.num_removes[0]
  if not n:
    return {'chosen': []}
  anew = config.method in pipeline.CHOOSE_ANEW
  gemma = config.model == _GEMMA.value
  most = n if anew or gemma else 10  # the deepest of the rows
  special = '-paper' if config.gate == 'output' else ''
  special += '-gemma' if gemma else ''
  special += '-pass' if config.num_sequences != BUDGET['num_sequences'] else ''
  path = work / 'choices' / f'{config.method}{special}{f"-{n}" if anew else ""}.json'
  path.parent.mkdir(exist_ok=True)
  with locked(path.with_suffix('.lock')):
    if not path.exists():
      start = time.monotonic()
      choice = pipeline.choose_layers(
        dataclasses.replace(job, config=dataclasses.replace(config, seed=0)), model, config.method, most
      )
      report_lib.write_json(path, choice | {'seconds': time.monotonic() - start})
  return pipeline.first(json.loads(path.read_text()), n)


@contextlib.contextmanager
def locked(path: pathlib.Path):
  """One process at a time; the lock of a process that ends is free."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def teraflops(job, model, removed: list[int]) -> float:
  """Multiplications and additions of a recipe with weight matrices, in 1e12; choosing and attention scores apart."""
  config, L, spec = job.config, model.num_layers, model.spec
  blocks = model.layers
  per_layer = sum(getattr(blocks, w).get_value().size / L for w in ('wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'))
  head, kept = spec.vocab_size * spec.d_model, L - len(removed)
  tokens, total = config.batch_size * config.seq_len, 0.0
  kind = config.recipe.removesuffix('_then_train')
  if kind in ('absorb', 'replace_linear'):
    left, shared = prune.kept_layers(L, removed), True
    for place, (l, end) in enumerate(zip(left, [*left[1:], L])):
      if (
        end > l + 1
      ):  # the dense stream up to the end of the run, layer l once more, the pruned stream, and the two sums
        a = spec.d_ff if kind == 'absorb' else spec.d_model
        layers = end + 1 + (0 if shared else place)
        solves, passes = 1, 1
        if spec.block == 'sandwich':  # see absorb._refit_normed
          solves = sum(absorb.NORMED_ROUNDS)
          passes = absorb.NORMED_ROUNDS[0] + solves + 1
        total += 2 * (passes * layers * per_layer + solves * a * (a + spec.d_model)) * tokens * config.steps()
        shared = False
  if config.recipe in TRAINED:
    depths = [kept] * config.steps()
    if config.recipe == 'regularize':
      off = [0] * config.steps()
      if config.order == 'sequential':
        off = [step * len(removed) // config.steps() for step in range(config.steps())]
      depths = [L - n for n in off]
    total += sum(6 * (depth * per_layer + head) for depth in depths) * tokens
    if config.distill:
      total += 2 * (L * per_layer + 2 * head) * tokens * config.steps()
  return total / 1e12


def config_of(name: str, settings: dict, work: pathlib.Path) -> Config:
  train, validation = split(pathlib.Path(_WIKITEXT.value), work)
  texts = {'validation': validation, 'WikiText-2 test': f'{_WIKITEXT.value}/test.txt', 'news': _NEWS.value}
  settings = {
      'model': _MODEL.value, 'workdir': str(work / 'rows' / file_name(name).removesuffix('.json')),
      'train_data': train, 'eval_data': tuple(f'{k}={v}' for k, v in texts.items()), 'compare': [],
      'checkpoint_every': 0, **BUDGET, **START, **settings,
  }  # fmt: skip
  if _TASKS_DIR.value and has_tasks(name):
    settings |= dict(tasks=_TASKS.value, tasks_dir=_TASKS_DIR.value, task_limit=_TASK_LIMIT.value, eval_batch_size=8)
  return Config(**settings)


def changed(config: Config) -> dict:
  """The settings that are not the defaults, as JSON has them; of files only the names, which mean the same elsewhere."""
  settings = {k: v for k, v in dataclasses.asdict(config).items() if v != getattr(Config, k, None) and k != 'workdir'}
  settings['method'] = config.method  # also where it is the default, which was another one
  file = lambda path: pathlib.PurePath(path).name
  corpus = lambda text: '='.join((text.partition('=')[0], file(text.partition('=')[2])))
  settings |= {k: file(settings[k]) for k in ('model', 'train_data', 'tasks_dir') if k in settings}
  settings['eval_data'] = [corpus(text) for text in config.eval_data]
  return json.loads(json.dumps(settings))


def same(config: Config, found: dict[str, dict]) -> dict | None:
  """A row that was run with the same settings: the search's best is the final row of its seed."""
  return next((row for row in found.values() if row.get('settings') == changed(config)), None)


def do(config: Config, name: str, work: pathlib.Path) -> dict:
  job = pipeline.prepare(config)
  model = pipeline.load(job)
  choice = choose(job, model, work)
  start = time.monotonic()
  pruned = pipeline.apply_recipe(job, model, choice, config.recipe)
  return {
    'settings': changed(config),
    **pipeline.measure(job, pruned, name),
    'removed': sorted(choice['chosen']),
    'candidates': choice.get('candidates', []),  # of auto
    'teraflops': teraflops(job, model, choice['chosen']),
    'seconds': time.monotonic() - start,
    'device': report_lib.device(),
    'versions': report_lib.versions(),
  }


def append(path: pathlib.Path, row: dict, work: pathlib.Path):
  """A line more, whole or not at all."""
  temporary = path.with_name(f'{path.name}.partial')
  with locked(work / f'{path.name}.lock'):
    before = path.read_text(encoding='utf-8') if path.exists() else ''
    temporary.write_text(f'{before}{json.dumps(row)}\n', encoding='utf-8')
    os.replace(temporary, path)


def ranges(layers: list[int]) -> str:
  """[3, 4, 5, 9] -> 3–5, 9."""
  runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1) if layers else []
  return ', '.join(str(run[0]) if len(run) == 1 else f'{run[0]}–{run[-1]}' for run in runs)


def seeds(members: list[dict]) -> int:
  return members[0].get('seeds', len(members))


def cells(members: list[dict], corpora: list[str], tasks: list[str]) -> list[str]:
  """Perplexities, accuracies in percent, training TFLOP; of several seeds the mean ± the standard deviation.

  Rows of before 2026-11-25 were read back from the document: several seeds are one row there, with 'seeds' and 'stdev'.
  """
  figures = []
  for corpus in corpora:
    values = [row['ppl'][corpus] for row in members]
    mean, stdev = statistics.mean(values), members[0].get('stdev', {}).get(corpus)
    stdev = statistics.stdev(values) if len(values) > 1 else stdev
    spread = '' if stdev is None else f' ± {stdev:.2f}'
    figures.append((f'{mean:.2f}' if mean < 1e4 else f'{mean:.1e}') + spread)
  for task in tasks:
    of = [row['tasks'][task] for row in members if task in row.get('tasks', {})]
    figures.append(f'{100 * of[0]["acc"]:.1f} ± {100 * of[0]["acc_stderr"]:.1f}' if of else '')
  return [*figures, f'{members[0]["teraflops"]:.0f}']


def document(done: dict[str, dict]) -> str:
  """The tables of each budget under a heading."""
  one_pass = {name.removeprefix(f'{PASS}/'): row for name, row in done.items() if name.startswith(f'{PASS}/')}
  small = {name: row for name, row in done.items() if not name.startswith(f'{PASS}/')}
  rates = f'{BEST_LR}; of Gemma {GEMMA_LR}'
  text = ''
  if one_pass:
    text += f'## One pass over the text\n\n{table(one_pass)}\n{about(one_pass, PASS_BUDGET)}\n\n'
  return (
    text + f"## A sixteenth of the paper's text\n\n{table(small)}\n{about(small, BUDGET)} Learning rates: {rates}.\n"
  )


def table(done: dict[str, dict]) -> str:
  corpora = list(next(iter(done.values()))['ppl'])
  tasks = list(dict.fromkeys(task for row in done.values() for task in row.get('tasks', {})))
  groups: dict[str, dict[str, list[dict]]] = {}
  for name, row in done.items():
    section, _, rest = name.rpartition('/') if '/' in name else ('final', '', name)
    groups.setdefault(section, {}).setdefault(rest.split(', seed ')[0], []).append(row)
  lines = []
  for section in sorted(groups, key=lambda s: (s != 'final', s)):
    head = [section, 'seeds', 'removed', *corpora, *(f'{t}, %' for t in tasks), 'TFLOP']
    lines += ['| ' + ' | '.join(head) + ' |', '|---|---:|---|' + '---:|' * (len(head) - 3)]
    for name, members in groups[section].items():
      row = [name, str(seeds(members)), ranges(members[0]['removed']), *cells(members, corpora, tasks)]
      lines.append('| ' + ' | '.join(row) + ' |')
    lines.append('')
  return '\n'.join(lines)


def about(done: dict[str, dict], budget: dict) -> str:
  """Devices, the versions on the first of them, and the budget; where there are several devices, how many rows each did."""
  devices = collections.Counter(row['device'] for row in done.values())
  named = '; '.join(f'{device} ({n} rows)' if len(devices) > 1 else device for device, n in devices.most_common())
  versions = next(row['versions'] for row in done.values() if row['device'] == devices.most_common(1)[0][0])
  shown = ', '.join(f'{k} {v}' for k, v in versions.items() if k in ('python', 'jax', 'flax', 'optax'))
  return f'Device: {named}; {shown}. Budget: {", ".join(f"{k}={v}" for k, v in budget.items())}.'


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  part, parts = map(int, _PART.value.split('/'))
  work = pathlib.Path(_WORKDIR.value)
  work.mkdir(parents=True, exist_ok=True)
  kept = pathlib.Path(_ROWS.value)
  if _TASKS_DIR.value and not _TABLE.value:  # now, and not at the first row that has tasks
    zero_shot.load_tasks(_TASKS.value.split(','), _TASKS_DIR.value)
  lines = map(json.loads, kept.read_text(encoding='utf-8').splitlines() if kept.exists() else [])
  found, done = {row.pop('name'): row for row in lines}, {}
  for i, (name, settings) in enumerate(rows(found)):
    several = name.split(', seed ')[0]  # the row of all seeds, where only that is kept
    asked = not _TABLE.value and i % parts == part and name.startswith(tuple(_ONLY.value))
    if asked and not {name, several} & found.keys():
      metrics.say(f'row {name}')
      config = config_of(name, settings, work)
      found[name] = same(config, found) or do(config, name, work)
      append(kept, {'name': name, **found[name]}, work)
      jax.clear_caches()
    if key := next((key for key in (name, several) if key in found), None):
      done[key] = found[key]
      metrics.say(f'{key}: {done[key]["ppl"]}')
  if parts > 1:
    return  # the others' rows are not here
  out = pathlib.Path(_OUT.value)
  text = out.read_text(encoding='utf-8') if out.exists() else BEGIN + END
  head, tail = text.split(BEGIN)[0], text.split(END)[1]
  metrics.write_whole(out, head + BEGIN + document(done) + END + tail)


if __name__ == '__main__':
  app.run(main)
