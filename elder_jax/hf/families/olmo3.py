"""OLMo 3: OLMo 2 with a window in three of four layers; only the others scale their positions."""

from elder_jax.hf.families import olmo2
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'OLMo 3'
WEIGHTS = olmo2.WEIGHTS


def layer_kinds(fields: Fields) -> list[str]:
  return fields.layer_kinds(lambda l: 'sliding_attention' if (l + 1) % 4 else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'rms_norm_eps': 1e-5, 'sliding_window': 4096} | config)
  size, window, kinds = olmo2.common(fields), fields.window('sliding_window'), layer_kinds(fields)
  far = fields.rope(size['head_dim'], theta=5e5, kinds='full_attention')
  near = fields.rope(size['head_dim'], theta=5e5, keys=('rope_theta', None), kinds='sliding_attention')
  local_L = tuple(int(kind == 'sliding_attention') for kind in kinds)
  window_L = tuple(window * local for local in local_L)
  return Spec(**size, **rope.features(far, near), rope_L=local_L, window_L=window_L), fields.done('olmo3')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept]}
