"""Settings that were given but that nothing in a run reads. None is dropped in silence."""

from collections.abc import Callable
import dataclasses

from elder_jax.run.config import TRAINED
from elder_jax.run.config import Config


def _scores(config: Config) -> bool:
  return config.remove_layers is None and config.methods() != ['elder']


def _elder(config: Config) -> bool:
  return config.remove_layers is None and 'elder' in config.methods()


def _trains(config: Config) -> bool:
  return bool(set(config.recipes()) & set(TRAINED)) and config.steps() > 0


# (settings, what reads them, whether this run has it)
_READERS: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
  ('method', '--remove_layers names the layers', lambda c: c.remove_layers is None),
  ('score_steps', 'no method scores layers', _scores),
  ('gate selection lambda1 gate_lr gate_steps protect_first protect_last', '--method=elder is not run', _elder),
  (
    'penalty penalty_scale lambda2 lambda2_power order anneal',
    '--recipe=regularize is not run',
    lambda c: 'regularize' in c.recipes() and c.steps() > 0,
  ),
  (
    'lr warmup_ratio weight_decay trainable optimizer moment_dtype lora_rank lora_alpha distill',
    'nothing trains',
    _trains,
  ),
  ('grad_clip grad_accum', 'nothing trains', lambda c: _trains(c) or _elder(c)),
  ('eval_seq_len eval_tokens', '--eval_data is empty', lambda c: bool(c.corpora())),
  ('eval_batch_size', '--eval_data and --tasks are empty', lambda c: bool(c.corpora() or c.task_names())),
  ('tasks_dir task_limit', '--tasks is empty', lambda c: bool(c.task_names())),
)


def told(config: Config) -> list[str]:
  """A line for each group of settings that differ from their defaults and are not read."""
  default = {field.name: field.default for field in dataclasses.fields(Config)}
  lines = []
  for names, why, reads in _READERS:
    given = [name for name in names.split() if getattr(config, name) != default[name]]
    if given and not reads(config):
      lines.append(f'not used: {", ".join(f"--{name}={getattr(config, name)}" for name in given)}, since {why}')
  texts = {entry for entry in config.eval_data if entry}
  if replaced := sorted(texts - {f'{name}={source}' for name, source in config.corpora().items()}):
    lines.append(f'not used: {", ".join(f"--eval_data={entry}" for entry in replaced)}, since later ones replace them')
  return lines
