"""EXAONE 4: norms after attention and the MLP, none before. With windows, the other layers have no positions."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import olmo2
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'EXAONE 4.0'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if 'input_layernorm' not in name} | olmo2.BRANCH_NORMS


DEFAULTS = dict(rms_norm_eps=1e-5, num_key_value_heads=32, sliding_window=4096)


def layer_kinds(fields: Fields) -> list[str]:
  """From layer_types, or sliding_window_pattern: a period, or a string such as LLLG."""
  window, every = fields.window('sliding_window'), fields.any('sliding_window_pattern')
  every = len(every) if isinstance(every, str) else every or 4
  return fields.layer_kinds(lambda l: 'sliding_attention' if window and (l + 1) % every else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(DEFAULTS | config)
  size, window, kinds = llama.sizes(fields), fields.window('sliding_window'), layer_kinds(fields)
  table = fields.rope(size['head_dim'])
  spec = Spec(
    **size,
    **rope.features(table, table.without_positions()),
    rope_L=tuple(int(window > 0 and kind == 'full_attention') for kind in kinds),
    window_L=tuple(window if kind == 'sliding_attention' else 0 for kind in kinds),
    block='branch',
    qk_norm=True,
  )
  return spec, fields.done('exaone4')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = layer_kinds(Fields(DEFAULTS | config))
  return {'layer_types': [kinds[l] for l in kept]}
