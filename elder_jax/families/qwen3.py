"""Qwen3, dense: Llama with norms on queries and keys."""

from elder_jax.families import llama
from elder_jax.families import qwen2
from elder_jax.families.fields import Fields
from elder_jax.model import Spec

WEIGHTS = llama.WEIGHTS
pruned = qwen2.pruned


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """config.json -> (Spec, number of layers). A key or value that is not understood is refused by name."""

  def features(fields: Fields) -> dict:
    bias = fields.flag('attention_bias')
    fields.size('head_dim', 128)
    return dict(qk_norm=True, qkv_bias=bias, out_bias=bias)

  return qwen2.read({'head_dim': 128} | config, 'qwen3', features)
