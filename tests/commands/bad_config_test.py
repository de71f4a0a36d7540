"""A wrong config.json is refused in one sentence that names the key, before weights are read."""

import pytest
from refusal import edit_json
from refusal import refused

pytestmark = pytest.mark.usefixtures('no_long_work')


@pytest.mark.parametrize(
  ('changes', 'parts'),
  [
    (dict(model_type='bert'), ["'bert'", 'llama']),
    (dict(model_type=None), ['model_type', 'None']),
    (dict(model_type=['llama']), ['model_type', "['llama']"]),
    (dict(num_experts=8), ["'num_experts'"]),
    (dict(num_experts=8, qk_clip=[1] * 999), ["the keys 'num_experts', 'qk_clip' are not known", 'model_type llama']),
    ({f'k{i}' * 30: i for i in range(13)}, ["the keys 'k0k0k0", "'k9k9", '… and 3 more are not known']),
    (dict(hidden_act='quick_gelu'), ["hidden_act='quick_gelu'", "'gelu_new'"]),
    (dict(hidden_act=['silu'] * 999), ["hidden_act=['silu', "]),
    (dict(attention_bias=True), ['model.layers.0.self_attn.q_proj.bias']),
    (dict(mlp_bias=True), ['model.layers.0.mlp.gate_proj.bias']),
    (dict(pruned_heads={'0': [1]}), ["pruned_heads={'0': [1]}", 'only {} is']),
    (dict(add_cross_attention=True), ['add_cross_attention=True']),
    (dict(layer_types=['full_attention'] * 5 + ['sliding_attention']), ['layer_types', "'full_attention'"]),
    (dict(sliding_window=128), ['sliding_window=128']),
    (dict(quantization_config={'bits': 4}), ['quantization_config marks the checkpoint as quantised; use']),
    (
      dict(quantization_config={'quant_method': 'gptq', 'ignore': ['lm_head'] * 999}),
      ["quantization_config marks the checkpoint as quantised with quant_method 'gptq'; use the unquantised one."],
    ),
    (dict(quantization={'bits': 4, 'group_size': 64}), ['quantization marks the checkpoint as quantised']),
    (dict(hidden_size='32'), ["hidden_size='32'"]),
    (dict(hidden_size=None), ['hidden_size=None']),
    (dict(hidden_size=32.0), ['hidden_size=32.0']),
    (dict(hidden_size=True), ['hidden_size=True']),
    (dict(hidden_size=[32]), ['hidden_size=[32]']),
    (dict(vocab_size=-1), ['vocab_size=-1']),
    (dict(vocab_size=262), ['model.embed_tokens.weight', '[262, 32]']),
    (dict(intermediate_size=0), ['intermediate_size=0']),
    (dict(num_attention_heads=0), ['num_attention_heads=0']),
    (dict(num_key_value_heads=0), ['num_key_value_heads=0']),
    (dict(num_key_value_heads=3), ['num_attention_heads=4', 'num_key_value_heads=3']),
    (dict(head_dim=7), ['head_dim=7']),
    (dict(head_dim=2**20), [f'head_dim={2**20}']),
    (dict(num_hidden_layers=0), ['num_hidden_layers=0']),
    (dict(num_hidden_layers='6'), ["num_hidden_layers='6'"]),
    (dict(num_hidden_layers=7), ['model.layers.6.', 'is missing']),
    (dict(num_hidden_layers=5), ['model.layers.5.', 'has no place']),
    (dict(num_hidden_layers=10**9), ['num_hidden_layers=1000000000']),
    (dict(rms_norm_eps='1e-5'), ["rms_norm_eps='1e-5'"]),
    (dict(rms_norm_eps=0), ['rms_norm_eps=0']),
    (dict(rms_norm_eps=float('nan')), ['rms_norm_eps=nan']),
    (dict(rms_norm_eps=10**400), ['rms_norm_eps=1000']),
    (dict(tie_word_embeddings='false'), ["tie_word_embeddings='false'"]),
    (dict(rope_parameters={'rope_type': 'twisted', 'factor': 2.0}), ["rope type 'twisted'"]),
    (dict(rope_parameters=None, rope_scaling={'type': 'longrope', 'factor': 2.0}), ['short_factor']),
    (dict(rope_parameters={'rope_type': ['linear']}), ['rope type', "['linear']"]),
    (dict(rope_parameters={'rope_type': 'linear', 'factor': 'two'}), ["factor='two'"]),
    (dict(rope_parameters={'rope_type': 'linear'}), ['factor=None']),
    (dict(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'beta': 1}), ["'beta'"]),
    (dict(rope_parameters={'rope_theta': -1.0}), ['rope_theta=-1.0']),
    (dict(rope_parameters={'rope_theta': 1e-300}), ['rope_theta']),
    (dict(rope_scaling=[1, 2]), ['rope_scaling=[1, 2]']),
    (dict(rope_scaling=[1] * 999), ['rope_scaling=[1, 1']),
    (dict(rope_parameters='linear'), ["rope_parameters='linear'"]),
    (
      dict(
        rope_parameters={
          'rope_type': 'llama3',
          'factor': 8.0,
          'low_freq_factor': 4.0,
          'high_freq_factor': 1.0,
          'original_max_position_embeddings': 64,
        }
      ),
      ['high_freq_factor=1.0', 'low_freq_factor=4.0'],
    ),
  ],
  ids=lambda v: str(v)[:60] if isinstance(v, dict) else '',
)
def test_config_json(settings, no_text, model, changes, parts):
  edit_json(model / 'config.json', **changes)
  refused(settings, *parts)
