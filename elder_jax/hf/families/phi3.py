"""Phi-3, Phi-4 and Phi-4-mini: Llama with q, k and v fused in one tensor, and gate and up in another."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Phi-3, Phi-4 (14B), Phi-4-mini'
_FUSED = 'q_proj k_proj v_proj gate_proj up_proj q_norm k_norm'.split()
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if not any(part in name for part in _FUSED)} | {
  # '+': the parts are concatenated in this dimension.
  'model.layers.{l}.self_attn.qkv_proj.weight': (
    ('layers.wq', '+NH,D->DNH'),
    ('layers.wk', '+KH,D->DKH'),
    ('layers.wv', '+KH,D->DKH'),
  ),
  'model.layers.{l}.mlp.gate_up_proj.weight': (('layers.w_gate', '+F,D->DF'), ('layers.w_up', '+F,D->DF')),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'rms_norm_eps': 1e-5} | config, 'original_max_position_embeddings')
  size, L = llama.sizes(fields), fields.size('num_hidden_layers')
  table = fields.rope(size['head_dim'], keys=('rope_theta', 'partial_rotary_factor'))
  window = fields.window('sliding_window')
  fields.one_kind(window)
  spec = Spec(**size, **rope.features(table), window_L=fields.per_layer(L, window))
  return spec, fields.done('phi3')
