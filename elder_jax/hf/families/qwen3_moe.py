"""Qwen3 with a mixture of experts in every layer."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Qwen3 with experts'
_MLP = 'model.layers.{l}.mlp.'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if '.mlp.' not in name} | {
  _MLP + 'gate.weight': ('layers.router', 'E,D->DE'),
  _MLP + 'experts.{e}.gate_proj.weight': ('layers.w_gate', 'F,D->DF'),
  _MLP + 'experts.{e}.up_proj.weight': ('layers.w_up', 'F,D->DF'),
  _MLP + 'experts.{e}.down_proj.weight': ('layers.w_down', 'D,F->FD'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  defaults = {'num_key_value_heads': 4, 'sliding_window': 4096}
  fields = Fields(defaults | config, 'max_window_layers intermediate_size')
  fields.only('decoder_sparse_step', 1)
  fields.only('mlp_only_layers', [])
  L, window = fields.size('num_hidden_layers'), fields.window('sliding_window', fields.flag('use_sliding_window'))
  fields.one_kind(window)
  size = llama.sizes(fields) | dict(d_ff=fields.size('moe_intermediate_size', 768))
  bias = fields.flag('attention_bias')
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'])),
    **fields.experts(128, 8),
    router='chosen' if fields.flag('norm_topk_prob') else 'all',
    window_L=fields.per_layer(L, window),
    qk_norm=True,
    qkv_bias=bias,
    out_bias=bias,
  )
  return spec, fields.done('qwen3_moe')
