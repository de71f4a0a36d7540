"""Qwen3.5, dense: three gated delta-nets for each gated attention layer, norms scaled by 1 + w."""

from elder_jax.errors import InputError
from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Delta
from elder_jax.model.spec import Spec

MODELS = 'Qwen3.5, dense'
_LAYER = 'model.layers.{l}.'
_DELTA = _LAYER + 'linear_attn.'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if 'q_proj' not in name} | {
  _LAYER + 'self_attn.q_proj.weight': (('layers.wq', 'N*H,D->DNH'), ('layers.w_attn_gate', 'N*H,D->DNH')),
  _DELTA + 'in_proj_qkv.weight': ('layers.w_delta', 'C,D->DC'),
  _DELTA + 'in_proj_z.weight': ('layers.w_delta_gate', 'Z,D->DZ'),
  _DELTA + 'in_proj_b.weight': ('layers.delta_beta', 'M,D->DM'),
  _DELTA + 'in_proj_a.weight': ('layers.delta_decay', 'M,D->DM'),
  _DELTA + 'conv1d.weight': ('layers.delta_kernel', 'C,*,W->CW'),
  _DELTA + 'dt_bias': ('layers.delta_bias', 'M->M'),
  _DELTA + 'A_log': ('layers.delta_log', 'M->M'),
  _DELTA + 'norm.weight': ('layers.delta_norm.scale', 'U->U'),
  _DELTA + 'out_proj.weight': ('layers.wo', 'D,NH->NHD'),
}
ONLY = {'.self_attn.': 0, '.linear_attn.': 1}  # part of a tensor's name -> the mixer_L of the layers that have it
_KINDS = ('full_attention', 'linear_attention')


def _layer_kinds(fields: Fields) -> list[str]:
  every = fields.size('full_attention_interval', 4)
  return fields.layer_kinds(lambda l: _KINDS[bool((l + 1) % every)], _KINDS)


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  config = {'num_key_value_heads': 4, 'head_dim': 256} | rope.of_text(config)
  fields = Fields(config, 'mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings')
  fields.only('attn_output_gate', True)
  fields.only('attention_bias', False)
  fields.only('mlp_only_layers', [])
  size, kinds = llama.sizes(fields), _layer_kinds(fields)
  delta = Delta(
    key_heads=fields.size('linear_num_key_heads', 16),
    value_heads=fields.size('linear_num_value_heads', 32),
    key_dim=fields.size('linear_key_head_dim', 128),
    value_dim=fields.size('linear_value_head_dim', 128),
    width=fields.size('linear_conv_kernel_dim', 4),
  )
  if delta.value_heads * delta.value_dim != size['num_heads'] * size['head_dim'] or delta.value_heads % delta.key_heads:
    raise InputError(
      'config.json: linear_num_value_heads × linear_value_head_dim must equal num_attention_heads × head_dim, and '
      'linear_num_value_heads must be a multiple of linear_num_key_heads; use another checkpoint.'
    )
  table = fields.rope(size['head_dim'], part=0.25, keys=('rope_theta', 'partial_rotary_factor'))
  spec = Spec(
    **size,
    **rope.features(table),
    norm='rms1',
    qk_norm=True,
    attn_gate=True,
    mixer_L=tuple(_KINDS.index(kind) for kind in kinds),
    delta=delta,
  )
  return spec, fields.done('qwen3_5_text')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = _layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept], 'full_attention_interval': None}
