"""Granite 3, dense: Llama with multipliers on the embedding, the scores, the residual updates and the logits."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Granite 3 and 4, dense'
WEIGHTS = llama.WEIGHTS


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(config)
  fields.one_kind(0)
  size, bias = llama.sizes(fields), fields.flag('attention_bias')
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'])),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=fields.flag('mlp_bias'),
    embed_scale=fields.number('embedding_multiplier', 1.0),
    attn_scale=fields.number('attention_multiplier', 1.0),
    residual_scale=fields.number('residual_multiplier', 1.0),
    logit_scale=1 / fields.number('logits_scaling', 1.0),
  )
  return spec, fields.done('granite')
