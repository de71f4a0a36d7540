"""Gemma 3, text: Gemma 2 with norms on queries and keys, and another rope base where there is a window."""

from elder_jax.families import gemma2
from elder_jax.families.fields import Fields
from elder_jax.model import Spec

WEIGHTS = gemma2.WEIGHTS
_DEFAULTS = dict(head_dim=256, tie_word_embeddings=True, sliding_window=4096, query_pre_attn_scalar=256)


def layer_kinds(fields: Fields) -> list[str]:
  every = fields.size('sliding_window_pattern', fields.size('_sliding_window_pattern', 6))
  return fields.layer_kinds(lambda l: 'sliding_attention' if (l + 1) % every else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """config.json -> (Spec, number of layers). A key or value that is not understood is refused by name."""
  fields = Fields(_DEFAULTS | config)
  features, window, kinds = gemma2.common(fields), fields.window('sliding_window'), layer_kinds(fields)
  H = features['head_dim']
  # The scaling of old files, rope_scaling, is for the layers without a window.
  far = fields.rope(H, theta=1e6, kinds='full_attention')
  near = fields.rope(H, theta=1e4, keys=('rope_local_base_freq', None), kinds='sliding_attention')
  local_L = tuple(int(kind == 'sliding_attention') for kind in kinds)
  window_L = tuple(window * local for local in local_L)
  spec = Spec(**features, qk_norm=True, rope_freq_RH=(far, near), rope_L=local_L, window_L=window_L)
  return spec, fields.done('gemma3_text')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that the removal of layers changes beside lists with an entry per layer."""
  kinds = layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept], 'sliding_window_pattern': None, '_sliding_window_pattern': None}
