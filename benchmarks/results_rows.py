"""The rows of the results table (benchmarks/results.py): methods, recipes, budgets and learning rates."""

from collections.abc import Iterator

from elder_jax.methods import METHODS

BUDGET = dict(
  seq_len=256, num_sequences=64, batch_size=4, train_steps=16, score_steps=4, eval_seq_len=512, eval_tokens=6144
)
# The settings of a row unless its name says otherwise. Written out, so that changed defaults do not change the rows.
START = dict(
  gate='residual', selection='one_shot', gate_lr=0.005, gate_steps=28, lambda2=1e-3, order='sequential', lr=3e-4
)
# The paper's settings (ELDeR, arXiv 2505.18232); steps and learning rate of the gates are from
# configs/paper_smollm2_135m.flags.
PAPER = dict(gate='output', selection='iterative', gate_lr=0.02, gate_steps=4, lambda2=1e-3, order='joint', lr=1e-4)
# The whole training text once, with evaluation texts and scoring batches that take a GPU seconds.
PASS = 'one pass'
PASS_BUDGET = dict(
  seq_len=512,
  num_sequences=400,
  batch_size=4,
  train_steps=100,
  score_steps=16,
  eval_seq_len=2048,
  eval_tokens=0,
  dtype='bfloat16',
)
PASS_START = dict(gate_steps=100)  # gates see as much text as training
PASS_PAPER = dict(gate_steps=14)  # the same, over seven rounds
LEARNING_RATES = (1e-4, 3e-4, 6e-4)
# The best of them on validation text, by recipe (rows search/…).
BEST_LR = dict(prune_then_train=6e-4, absorb_then_train=3e-4, replace_linear_then_train=6e-4, regularize=6e-4)
GEMMA = 'Gemma 3 270M'
# The same for Gemma (rows Gemma 3 270M, search/…). The lowest of SmolLM2's rates was best there, so a lower one is added.
GEMMA_RATES = (3e-5, 1e-4, 3e-4)
GEMMA_LR = dict(prune_then_train=1e-4, absorb_then_train=3e-5, regularize=1e-4)
GEMMA_CHOICE = 'sleb'  # the best method on validation text (rows Gemma 3 270M/…)
CHOICE = 'cosine_block'  # the method of rows that compare recipes


def rows(found: dict[str, dict], gemma: str, one_pass: bool) -> Iterator[tuple[str, dict]]:
  """Yields (name, settings) of each row, in running order.

  The settings are those that differ from START and BUDGET. Rows of one pass include their whole budget. Rows that use a
  searched learning rate follow once `found` has the rows of the search.

  Args:
    found: finished rows by name.
    gemma: the model file of Gemma 3 270M; empty: without its rows.
    one_pass: with the rows of the second budget.
  """
  yield from small_rows().items()
  if gemma:
    yield from gemma_rows(gemma).items()
  if one_pass:
    yield from ((name, PASS_BUDGET | settings) for name, settings in pass_rows(found))


def pass_rows(found: dict[str, dict]) -> Iterator[tuple[str, dict]]:
  """Like `rows`, for the second budget."""

  def ready(rows):
    return ((f'{PASS}/{name}', PASS_START | how) for name, how in rows.items())

  seven = dict(method=CHOICE, num_remove=7)
  how = {
    'prune_then_train': {},
    'absorb_then_train': {},
    'replace_linear_then_train': {},
    'regularize': {},
    # Annealed gates instead of the penalty.
    'regularize, annealed': dict(lambda2=0.0, order='joint', anneal=0.3),
    'prune_then_train, distilled': dict(distill=0.5),
    'absorb_then_train, distilled': dict(distill=0.5),
  }
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
  for seed in (0, 1, 2):
    yield from ready(paper_rows(PAPER | PASS_PAPER, seed))
  yield from ready(untrained_rows((4, 10)))


def final_rows(how: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
  """Rows of three seeds. how: recipe -> settings; rates: recipe -> learning rate."""
  # The rival gets the multiply-adds of absorbing as additional training steps on the same text.
  more_steps = dict(**how['prune_then_train'], train_steps=150)
  how = how | {'prune_then_train, half as many steps more': more_steps}
  rates = rates | {'prune_then_train, half as many steps more': rates['prune_then_train']}
  return {
    f'final/{name}, seed {seed}': dict(method=CHOICE, num_remove=7, lr=rates[name], seed=seed, **more)
    for seed in (0, 1, 2)
    for name, more in how.items()
  }


def other_choices(how: dict[str, dict], rates: dict[str, float]) -> dict[str, dict]:
  """Like `final_rows`, at other depths and with layers chosen by other methods."""
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
  """The learning rate of the rows 'PREFIX, lr …' with the lowest validation perplexity; None if a row is missing."""
  rows = {lr: found.get(f'{prefix}, lr {lr:g}') for lr in LEARNING_RATES}
  return None if None in rows.values() else min(rows, key=lambda lr: rows[lr]['ppl']['validation'])


def paper_rows(settings: dict, seed: int) -> dict[str, dict]:
  how = dict(num_remove=7, recipe='regularize', method='elder', seed=seed, **settings)
  return {f"paper/regularize, the paper's settings, seed {seed}": how}


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
  """Like `rows`, for the first budget, on SmolLM2."""
  rows = {'dense': dict(method=CHOICE, num_remove=0, recipe='none')}
  seven = dict(method=CHOICE, num_remove=7)
  rivals = ('prune_then_train', 'absorb_then_train', 'replace_linear_then_train', 'regularize')
  for recipe in rivals:
    for lr in LEARNING_RATES:
      rows[f'search/{recipe}, lr {lr:g}'] = dict(seven, recipe=recipe, lr=lr)

  def final(name, seed, **more):
    return rows.update({f'final/{name}, seed {seed}': dict(seven, seed=seed, **more)})

  for seed in (0, 1, 2):
    for recipe in rivals[:2]:
      final(recipe, seed, recipe=recipe, lr=BEST_LR[recipe])
    final('prune_then_train, lr 0.0003', seed, recipe='prune_then_train', lr=3e-4)
  for seed in (0, 1, 2):
    for recipe in rivals[:2]:
      final(f'{recipe}, distilled', seed, recipe=recipe, lr=3e-4, distill=0.5)
    final('prune_then_train, distilled, lr 0.0006', seed, recipe='prune_then_train', lr=6e-4, distill=0.5)
  for seed in (0, 1, 2):
    # The rival gets the multiply-adds of absorbing as additional training steps on the same text.
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
    for recipe in rivals[:2]:  # long contiguous blocks are a bad choice here
      how = dict(method='sleb', num_remove=10, recipe=recipe, lr=BEST_LR[recipe], seed=seed)
      rows[f'other depths/10 layers, chosen by sleb, {recipe}, seed {seed}'] = how
    for method in ('elder', 'sleb', 'taylor'):
      for recipe in rivals[:2]:
        how = dict(method=method, num_remove=7, recipe=recipe, lr=BEST_LR[recipe], seed=seed)
        rows[f'other choices/{method}, {recipe}, seed {seed}'] = how
    for part in (0.6, 0.3):
      how = dict(seven, recipe='regularize', lambda2=0.0, order='joint', anneal=part, seed=seed)
      rows[f'ideas/regularize, gates annealed over {part:.0%} of the steps, seed {seed}'] = how
    rows |= paper_rows(PAPER, seed)
  return rows


def gemma_rows(model: str) -> dict[str, dict]:
  """Rows that remove 4 of 18 layers. Recipes are compared on the choice with the best untrained validation perplexity."""
  four = dict(model=model, num_remove=4)
  recipes = dict(
    prune_then_train={},
    absorb_then_train={},
    # Annealed gates, which did better than the penalty on SmolLM2.
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
    # The rival gets the multiply-adds of absorbing.
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
