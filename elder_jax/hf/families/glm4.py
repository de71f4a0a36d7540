"""GLM-4 of April 2025: norms before and after attention and MLP; half of each head is rotated, in neighbouring pairs."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'GLM-4 and GLM-Z1 of April 2025'
_FUSED = 'gate_proj up_proj q_norm k_norm'.split()
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if not any(part in name for part in _FUSED)} | {
  'model.layers.{l}.post_self_attn_layernorm.weight': ('layers.post_attn_norm.scale', 'D->D'),
  'model.layers.{l}.post_mlp_layernorm.weight': ('layers.post_mlp_norm.scale', 'D->D'),
  'model.layers.{l}.mlp.gate_up_proj.weight': (('layers.w_gate', '+F,D->DF'), ('layers.w_up', '+F,D->DF')),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'head_dim': 128, 'num_key_value_heads': 2, 'rms_norm_eps': 1.5625e-7} | config)
  fields.one_kind(0)
  size = llama.sizes(fields)
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'], part=0.5, keys=('rope_theta', 'partial_rotary_factor'))),
    rope_pairs=True,
    block='sandwich',
    qkv_bias=fields.flag('attention_bias', True),
  )
  return spec, fields.done('glm4')
