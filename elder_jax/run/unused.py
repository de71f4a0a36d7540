"""Finds settings that were given but that a run does not use, so that they are reported."""

from collections.abc import Callable

from elder_jax.errors import as_text
from elder_jax.methods import find_method
from elder_jax.recipes import find_recipe
from elder_jax.run.config import Config
from elder_jax.run.config import defaults


def _trains(config: Config) -> bool:
  return any(config.trains(recipe) for recipe in config.recipes())


def _penalises(config: Config) -> bool:
  return any(config.trains(r) and find_recipe(r).removes_last for r in config.recipes())


def _chosen_by(*names: str) -> Callable[[Config], bool]:
  """Returns a function: whether a method of the run uses one of these settings."""
  return lambda config: any(set(names) & set(find_method(m).reads) for m in config.methods())


_GATES = 'gate selection lambda1 gate_lr gate_steps'
_PROTECT = 'protect_first protect_last'
_MASK = 'mask_steps mask_lr mask_loss'

# (settings, why they are not used, whether a run uses them)
_READERS: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
  ('method', '--remove_layers gives the layers', lambda c: c.removal.remove_layers is None),
  ('score_steps', 'no method scores layers', _chosen_by('score_steps')),
  (_GATES, '--method=elder is not used', _chosen_by(*_GATES.split())),
  (_PROTECT, 'neither --method=elder nor --method=mask is used', _chosen_by(*_PROTECT.split())),
  (_MASK, '--method=mask is not used', _chosen_by(*_MASK.split())),
  ('swap_tries', '--method=swaps is not used', _chosen_by('swap_tries')),
  ('judge_steps judge_by', '--method=auto is not used', _chosen_by('judge_steps')),
  ('penalty penalty_scale lambda2 lambda2_power order anneal', '--recipe=regularize is not used', _penalises),
  (
    'lr warmup_ratio lr_schedule lr_final weight_decay trainable optimizer moment_dtype lora_rank lora_alpha distill '
    'distill_hidden',
    'no recipe trains',
    _trains,
  ),
  ('export', 'no recipe trains', _trains),
  ('validation_sequences', '--validate_every is 0', lambda c: c.training.validate_every > 0),
  ('num_sequences', '--train_tokens replaces it', lambda c: c.data.train_tokens is None),
  ('decay_ratio', '--lr_schedule=wsd is not used', lambda c: _trains(c) and c.training.lr_schedule == 'wsd'),
  ('temperature', '--distill is not used', lambda c: _trains(c) and c.training.distils),
  ('kept_layers', '--distill_hidden is 0', lambda c: _trains(c) and c.training.distill_hidden > 0),
  ('teacher', '--distill and --distill_hidden are 0', lambda c: _trains(c) and c.training.taught),
  ('grad_clip grad_accum track', 'no recipe trains', lambda c: _trains(c) or _chosen_by('grad_clip')(c)),
  ('eval_seq_len eval_tokens', '--eval_data is empty', lambda c: bool(c.evaluation.eval_data)),
  (
    'eval_batch_size',
    '--eval_data and --tasks are empty',
    lambda c: bool(c.evaluation.eval_data or c.evaluation.tasks),
  ),
  ('answer_tokens', 'no prompts are answered', lambda c: c.evaluation.asks_prompts),
  ('tasks_dir task_limit', '--tasks is empty', lambda c: bool(c.evaluation.tasks)),
)


def unused_settings(config: Config) -> list[str]:
  """Returns a line for each group of settings that differ from their defaults and are not used."""
  default, now, lines = defaults(), config.flat(), []
  for names, why, reads in _READERS:
    given = [name for name in names.split() if now[name] != default[name]]
    if given and not reads(config):
      lines.append(f'not used: {", ".join(f"--{name}={as_text(now[name])}" for name in given)}, because {why}')
  return lines
