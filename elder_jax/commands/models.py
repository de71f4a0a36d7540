"""`elder_jax models`: prints which models are supported and what works for each. docs/models.md contains this table."""

from elder_jax.commands.command import Command
from elder_jax.commands.flags import Parsed
from elder_jax.errors import InputError
from elder_jax.hf import multimodal
from elder_jax.hf.families import FAMILIES
from elder_jax.model.spec import Spec
from elder_jax.recipes import RECIPES

_RECIPES = ('absorb', 'replace_linear', 'prune_comp', 'linear_patch')
_SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
# config.json of a small model. Families differ in the names of its sizes.
_SMALL = (
  _SIZES | dict(intermediate_size=48, num_key_value_heads=2),
  _SIZES | dict(intermediate_size=48),
  _SIZES | dict(ffn_dim=48),
  _SIZES | dict(intermediate_size=48, num_attention_heads=16),
  dict(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=16),
)


def table() -> str:
  """Returns a Markdown table with a row per model_type."""
  lines = [
    ['Models', '`model_type`', *(f'`{name}`' for name in _RECIPES), 'training', 'GGUF in and out', 'real weights']
  ]
  lines.append(['---'] * len(lines[0]))
  for kind, family in FAMILIES.items():
    lines.append([family.MODELS, f'`{kind}`', *_what(kind), getattr(family, 'RUN', '')])
  for kind, about in multimodal.KINDS.items():
    lines.append([f'{about.models}, the language model', f'`{kind}`', *_what(about.language, gguf=False), ''])
  return '\n'.join('|' + '|'.join(f' {cell} ' if cell else ' ' for cell in line) + '|' for line in lines)


def _what(kind: str, gguf: bool = True) -> list[str]:
  """The cells from the recipes to GGUF."""
  spec, family = _spec(kind), FAMILIES[kind]
  recipes = ['' if RECIPES[name].refuses(spec) else 'yes' for name in _RECIPES]
  trained = 'without LoRA on experts' if spec.experts else 'yes'
  return [*recipes, trained, 'yes' if gguf and hasattr(family, 'GGUF_ARCHITECTURE') else '']


def _spec(kind: str) -> Spec:
  """The Spec of a small model with the family's defaults."""
  why = None
  for config in _SMALL:
    try:
      return FAMILIES[kind].spec_from_config(config | {'model_type': kind})[0]
    except InputError as e:
      why = e
  raise AssertionError(f'no small config.json of {kind}: {why}')


def run(parsed: Parsed):
  del parsed
  print(table())


COMMAND = Command('models', 'Print the supported models, and what works for each.', run, {}, ('elder_jax models',))
