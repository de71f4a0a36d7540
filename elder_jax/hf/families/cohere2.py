"""Command R7B and Command A: attention and MLP in parallel after one norm; only layers with a window have positions."""

from elder_jax.hf.families import llama
from elder_jax.hf.families import rope
from elder_jax.hf.families.fields import Fields
from elder_jax.model.spec import Spec

MODELS = 'Command R7B, Command A, Tiny Aya'
WEIGHTS = {name: row for name, row in llama.WEIGHTS.items() if 'post_attention_layernorm' not in name}


def layer_kinds(fields: Fields) -> list[str]:
  every = fields.size('sliding_window_pattern', fields.size('_sliding_window_pattern', 4))
  return fields.layer_kinds(lambda l: 'sliding_attention' if (l + 1) % every else 'full_attention')


def spec_from_config(config: dict) -> tuple[Spec, int]:
  """(Spec, number of layers) of a config.json. Raises InputError for a key or value that is not supported."""
  fields = Fields(
    {'tie_word_embeddings': True, 'sliding_window': 4096} | config,
    'order_of_interleaved_layers rotary_pct use_embedding_sharing',
  )
  fields.any('rms_norm_eps')  # unused: the norms are LayerNorms
  size, bias = llama.sizes(fields), fields.flag('attention_bias')
  window, kinds = fields.window('sliding_window'), layer_kinds(fields)
  for key, value in (('position_embedding_type', 'rope_gptj'), ('use_qk_norm', False), ('use_parallel_block', True)):
    fields.only(key, value)
  for key, value in (('use_gated_activation', True), ('use_parallel_embedding', False), ('layer_switch', 4)):
    fields.only(key, value)
  table = fields.rope(size['head_dim'])
  spec = Spec(
    **size | dict(norm_eps=fields.number('layer_norm_eps', 1e-5)),
    **rope.features(table, table.without_positions()),
    rope_L=tuple(int(kind == 'full_attention') for kind in kinds),
    window_L=tuple(window if kind == 'sliding_attention' else 0 for kind in kinds),
    rope_pairs=True,
    norm='layer0',
    block='parallel',
    shared_norm=True,
    qkv_bias=bias,
    out_bias=bias,
    logit_scale=fields.number('logit_scale', 0.0625),
  )
  return spec, fields.done('cohere2')


def pruned(config: dict, kept: list[int]) -> dict:
  """The keys of config.json that a removal changes, besides the depth and lists with an entry per layer."""
  kinds = layer_kinds(Fields(config))
  return {'layer_types': [kinds[l] for l in kept], 'sliding_window_pattern': None, '_sliding_window_pattern': None}
