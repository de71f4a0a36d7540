"""gpt-oss: experts with biases and a clipped activation, attention with sinks, a window in every second layer."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'gpt-oss, also as published in MXFP4'
_LAYER = 'model.layers.{l}.'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if '.mlp.' not in name} | {
  _LAYER + 'self_attn.sinks': ('layers.sinks', 'N->N'),
  _LAYER + 'mlp.router.weight': ('layers.router', 'E,D->DE'),
  _LAYER + 'mlp.router.bias': ('layers.router_bias', 'E->E'),
  _LAYER + 'mlp.experts.gate_up_proj': (('layers.w_gate', 'E,D,F*->EDF'), ('layers.w_up', 'E,D,F*->EDF')),
  _LAYER + 'mlp.experts.gate_up_proj_bias': (('layers.b_gate', 'E,F*->EF'), ('layers.b_up', 'E,F*->EF')),
  _LAYER + 'mlp.experts.down_proj': ('layers.w_down', 'E,F,D->EFD'),
  _LAYER + 'mlp.experts.down_proj_bias': ('layers.b_down', 'E,D->ED'),
}
_DEFAULTS = {'head_dim': 64, 'num_key_value_heads': 8, 'sliding_window': 128, 'rms_norm_eps': 1e-5}
_YARN = {
  'rope_type': 'yarn',
  'factor': 32.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'truncate': False,
  'original_max_position_embeddings': 4096,
}


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  yarn = {} if config.get('rope_scaling') or config.get('rope_parameters') else {'rope_scaling': _YARN}
  fields = Fields(_DEFAULTS | config | yarn, 'experts_per_token initial_context_length')
  size, window = llama.sizes(fields), fields.window('sliding_window')
  kinds = fields.layer_kinds(lambda l: 'full_attention' if l % 2 else 'sliding_attention')
  bias = fields.flag('attention_bias', True)
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'], theta=150000.0)),
    **fields.experts(128, 4),
    router_bias=True,
    glu_limit=fields.number('swiglu_limit', 7.0),
    glu_alpha=fields.number('swiglu_alpha', 1.702),
    sinks=True,
    window_L=tuple(window if kind == 'sliding_attention' else 0 for kind in kinds),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=True,
  )
  return spec, fields.done('gpt_oss')
