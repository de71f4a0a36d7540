"""Configs of each family with the keys of transformers: a small one with every feature on, and one with odd sizes."""

V = 131
SMALL = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=5,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  initializer_range=0.1,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=None,
)
LARGE = SMALL | dict(hidden_size=40, num_hidden_layers=6, num_attention_heads=5, num_key_value_heads=1, head_dim=12)
WIDE = {k: v for k, v in LARGE.items() if k != 'head_dim'} | dict(hidden_size=60)
FULL = {k: v for k, v in SMALL.items() if k != 'num_key_value_heads'}
GPT2 = dict(
  vocab_size=V, n_embd=32, n_layer=5, n_head=4, n_positions=64, initializer_range=0.1, bos_token_id=0, eos_token_id=1
)
OPT = dict(
  vocab_size=V,
  hidden_size=32,
  ffn_dim=48,
  num_hidden_layers=5,
  num_attention_heads=4,
  max_position_embeddings=64,
  word_embed_proj_dim=32,
  init_std=0.1,
  bos_token_id=0,
  eos_token_id=1,
  pad_token_id=None,
  dropout=0.0,
)
LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0}
KINDS = ['sliding_attention', 'full_attention', 'sliding_attention', 'sliding_attention', 'full_attention']
GEMMA = dict(hidden_activation='gelu_pytorch_tanh', query_pre_attn_scalar=20, sliding_window=7)
DELTA = dict(
  head_dim=16,
  linear_num_key_heads=2,
  linear_num_value_heads=4,
  linear_key_head_dim=8,
  linear_value_head_dim=16,
  linear_conv_kernel_dim=3,
)
MIXED = ['linear_attention', 'full_attention', 'linear_attention', 'linear_attention', 'full_attention']
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
CASES = {
  'llama': SMALL | dict(rope_parameters=LLAMA3, tie_word_embeddings=True),
  'llama, biases': LARGE | dict(attention_bias=True, mlp_bias=True),
  'mistral': SMALL | dict(sliding_window=7),
  'mistral, no window': LARGE | dict(sliding_window=None),
  'qwen2': SMALL | dict(use_sliding_window=True, sliding_window=7, max_window_layers=3),
  'qwen2, no window': LARGE | dict(tie_word_embeddings=True),
  'qwen3': SMALL | dict(head_dim=12, use_sliding_window=True, sliding_window=7, max_window_layers=2),
  'qwen3, biases': LARGE | dict(attention_bias=True, tie_word_embeddings=True),
  'gemma2': SMALL | GEMMA | dict(head_dim=12, attn_logit_softcapping=3.0, final_logit_softcapping=2.0),
  'gemma2, layer types': LARGE | GEMMA | dict(num_hidden_layers=5, layer_types=KINDS, attn_logit_softcapping=None),
  'gemma3_text': SMALL | GEMMA | dict(head_dim=12, sliding_window_pattern=3),
  'gemma3_text, scaled': LARGE
  | GEMMA
  | dict(
    num_hidden_layers=5,
    layer_types=KINDS,
    rope_parameters={'full_attention': LINEAR, 'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0}},
  ),
  'phi': FULL | dict(partial_rotary_factor=0.5),
  'phi, grouped': SMALL | dict(hidden_size=48, partial_rotary_factor=0.67, hidden_act='gelu'),
  'phi3': SMALL | dict(sliding_window=7),
  'phi3, partial': SMALL
  | dict(
    hidden_size=48,
    num_hidden_layers=6,
    tie_word_embeddings=True,
    rope_parameters={'rope_type': 'default', 'rope_theta': 500.0, 'partial_rotary_factor': 0.67},
  ),
  'opt': OPT,
  'opt, post-norm': OPT | dict(do_layer_norm_before=False, num_hidden_layers=6, hidden_size=40, word_embed_proj_dim=40),
  'opt, no biases': OPT | dict(enable_bias=False, tie_word_embeddings=False),
  'gpt2': GPT2,
  'gpt2, wide': GPT2 | dict(n_inner=50, n_layer=6, activation_function='relu', tie_word_embeddings=False),
  'gpt_neox': FULL | dict(rotary_pct=0.5),
  'gpt_neox, sequential': FULL
  | dict(
    hidden_size=40,
    num_attention_heads=2,
    num_hidden_layers=6,
    use_parallel_residual=False,
    attention_bias=False,
    rotary_emb_base=100,
    rotary_pct=0.5,
  ),
  'smollm3': SMALL
  | dict(no_rope_layers=[1, 0, 1, 1, 0], use_sliding_window=True, sliding_window=7, num_hidden_layers=5),
  'smollm3, interval': LARGE | dict(no_rope_layer_interval=3, tie_word_embeddings=False, attention_bias=True),
  'olmo2': SMALL,
  'olmo2, biases': WIDE | dict(attention_bias=True, tie_word_embeddings=True),
  'olmo3': SMALL
  | dict(
    sliding_window=7,
    num_hidden_layers=6,
    rope_parameters={
      'full_attention': LINEAR,
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
    },
  ),
  'exaone4': SMALL | dict(sliding_window=7, sliding_window_pattern=3, head_dim=12),
  'exaone4, no window': LARGE | dict(sliding_window=None, layer_types=['full_attention'] * 6, tie_word_embeddings=True),
  'granite': SMALL
  | dict(embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.3, logits_scaling=4.0),
  'granite, biases': LARGE
  | dict(attention_bias=True, mlp_bias=True, residual_multiplier=0.7, tie_word_embeddings=True),
  'glm4': SMALL | dict(head_dim=12),
  'glm4, no biases': LARGE | dict(attention_bias=False, partial_rotary_factor=1.0, tie_word_embeddings=True),
  'cohere2': SMALL | dict(sliding_window=7, sliding_window_pattern=3, logit_scale=0.3),
  'cohere2, biases': LARGE | dict(attention_bias=True, tie_word_embeddings=False),
  'starcoder2': SMALL | dict(sliding_window=7),
  'starcoder2, no biases': WIDE | dict(use_bias=False, tie_word_embeddings=False),
  'seed_oss': SMALL | dict(head_dim=12),
  'seed_oss, biases': LARGE | dict(attention_bias=False, attention_out_bias=True, mlp_bias=True),
  'ernie4_5': SMALL | dict(head_dim=12),
  'ernie4_5, biases': LARGE | dict(use_bias=True, tie_word_embeddings=False),
  'hunyuan_v1_dense': SMALL | dict(head_dim=12),
  'hunyuan_v1_dense, biases': LARGE | dict(attention_bias=True, tie_word_embeddings=True),
  'apertus': SMALL,
  'apertus, biases': WIDE | dict(attention_bias=True, rope_parameters=LLAMA3),
  'nemotron': SMALL | dict(partial_rotary_factor=0.5),
  'mixtral': SMALL | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
  'mixtral, odd': LARGE | dict(num_local_experts=5, num_experts_per_tok=3, tie_word_embeddings=True),
  'qwen3_moe': SMALL | EXPERTS | dict(head_dim=12, norm_topk_prob=True, use_sliding_window=True, sliding_window=7),
  'qwen3_moe, biases': LARGE | EXPERTS | dict(attention_bias=True, num_experts_per_tok=1, tie_word_embeddings=True),
  'gpt_oss': SMALL | dict(head_dim=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=7),
  'gpt_oss, no biases': LARGE
  | dict(
    num_local_experts=5,
    num_experts_per_tok=3,
    attention_bias=False,
    sliding_window=5,
    rope_parameters=LINEAR,
    layer_types=['full_attention', *KINDS],
    swiglu_limit=0.4,
    swiglu_alpha=1.2,
  ),
  'qwen3_5_text': SMALL | DELTA | dict(layer_types=MIXED),
  'qwen3_5_text, interval': LARGE
  | DELTA
  | dict(linear_num_value_heads=10, linear_value_head_dim=8, linear_num_key_heads=5, tie_word_embeddings=True)
  | dict(initializer_range=0.07),
  'nemotron, biases': LARGE | dict(attention_bias=True, mlp_bias=True, partial_rotary_factor=1.0),
}
