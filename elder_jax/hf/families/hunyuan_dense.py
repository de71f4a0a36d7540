"""Hunyuan, dense: Llama with norms on each head's query and key, after the rotary embedding."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Hunyuan, dense'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if '_norm' not in name} | {
  'model.layers.{l}.self_attn.query_layernorm.weight': ('layers.q_norm.scale', 'H->H'),
  'model.layers.{l}.self_attn.key_layernorm.weight': ('layers.k_norm.scale', 'H->H'),
}


# In the first files: token ids, heads for other tasks, and features that are off.
_NEUTRAL = (
  'eod_token_id im_start_id im_end_id im_newline_id text_start_id text_end_id image_token_id video_start_id video_end_id '
  'mask_init_id num_media_embeds org_vocab_size pool_type class_num add_classification_head cla_share_factor dense_list '
  'attention_head_dim norm_type'
)


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields({'rms_norm_eps': 1e-5} | _with_base(config), _NEUTRAL)
  for key, value in (('use_qk_norm', True), ('use_rotary_pos_emb', True), ('use_cla', False)):
    fields.only(key, value)
  fields.only('position_embedding_xdrope', False)
  fields.one_kind(0)
  size, bias = llama.sizes(fields), fields.flag('attention_bias')
  spec = Spec(
    **size,
    **rope.features(fields.rope(size['head_dim'])),
    qk_norm=True,
    qk_norm_last=True,
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=fields.flag('mlp_bias'),
  )
  return spec, fields.done('hunyuan_v1_dense')


def _with_base(config: dict) -> dict:
  """Replaces a `dynamic` scaling with a fixed alpha by the larger base that it stands for.

  theta · alpha^(d / (d − 2)), as in transformers' HunYuanDenseV1RotaryEmbedding. Its other keys are ignored.
  """
  for key in ('rope_scaling', 'rope_parameters'):
    table = config.get(key)
    if isinstance(table, dict) and table.get('rope_type', table.get('type')) == 'dynamic' and table.get('alpha'):
      alpha = rope.above_0('alpha', table['alpha'])
      theta = rope.above_0('rope_theta', table.get('rope_theta') or config.get('rope_theta') or 10000.0)
      width = config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']
      config = config | {key: {'rope_type': 'default', 'rope_theta': theta * alpha ** (width / (width - 2))}}
  return config
