"""Mixtral: Mistral with a mixture of experts."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Mixtral'
_MLP = 'model.layers.{l}.block_sparse_moe.'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if '.mlp.' not in name} | {
  _MLP + 'gate.weight': ('layers.router', 'E,D->DE'),
  _MLP + 'experts.{e}.w1.weight': ('layers.w_gate', 'F,D->DF'),
  _MLP + 'experts.{e}.w3.weight': ('layers.w_up', 'F,D->DF'),
  _MLP + 'experts.{e}.w2.weight': ('layers.w_down', 'D,F->FD'),
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'num_key_value_heads': 8, 'rms_norm_eps': 1e-5} | config)
  size, L = llama.sizes(fields), fields.size('num_hidden_layers')
  window = fields.window('sliding_window')
  fields.one_kind(window)
  table = fields.rope(size['head_dim'], theta=1e6)
  few = fields.experts(8, 2)
  return Spec(**size, **rope.features(table), **few, window_L=fields.per_layer(L, window)), fields.done('mixtral')
