"""Reads config.json strictly: a key that may change the computation and is not supported raises InputError."""

from elder_jax.errors import InputError
from elder_jax.errors import shown
from elder_jax.hf.families import rope

# Keys that do not change the logits of any family: metadata, special tokens, dropout and initialisation, generation
# defaults, classification heads, and settings of other libraries.
NEUTRAL = frozenset(
  """
  _name_or_path name_or_path architectures auto_map model_type torch_dtype dtype transformers_version is_llama_config
  transformers.js_config _commit_hash custom_pipelines unsloth_fixed unsloth_version finetuning_task task_specific_params
  use_cache max_position_embeddings max_sequence_length model_max_length n_ctx pretraining_tp

  bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id eos_token_ids tokenizer_class
  prefix n_special predict_special_tokens

  dropout activation_dropout attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob
  classifier_dropout attn_pdrop embd_pdrop resid_pdrop layerdrop initializer_range init_std neftune_noise_alpha

  max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
  remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens cache_implementation

  id2label label2id num_labels _num_labels problem_type summary_type summary_use_proj summary_activation
  summary_proj_to_labels summary_first_dropout

  output_attentions output_hidden_states output_past return_dict chunk_size_feed_forward is_encoder_decoder is_decoder
  cross_attention_hidden_size tie_encoder_decoder output_projection torchscript use_bfloat16 tf_legacy_loss xla_device
  gradient_checkpointing reorder_and_upcast_attn attn_implementation _attn_implementation _attn_implementation_internal
  _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn use_flash_attention_2
  """.split()
)
# Key -> the value that turns its feature off. Families that support the feature read the key themselves.
OFF = {
  'add_cross_attention': False,
  'attention_bias': False,
  'full_attn_mod': 1,
  'interpolate_factor': 1,
  'is_causal': True,
  'learned_embeddings': True,
  'lm_head_bias': False,
  'mlp_bias': False,
  'pruned_heads': {},
  'qk_layernorm': False,
  'rope_interleaved': False,
  'scale_embeddings': False,
  'use_bidirectional_attention': False,
  'use_mrope': False,
  'use_sliding_window': False,
}
# Activation in config.json -> name in model.layers.ACTIVATIONS.
ACTIVATIONS = {name: name for name in ('silu', 'relu', 'relu2', 'gelu')} | {'swish': 'silu', 'gelu_python': 'gelu'}
# transformers implements the same formula in several ways; they differ by at most 2.4e-7.
ACTIVATIONS |= dict.fromkeys(
  ('gelu_new', 'gelu_fast', 'gelu_accurate', 'gelu_pytorch_tanh', 'gelu_python_tanh'), 'gelu_tanh'
)
_QUANTISED = ('quantization_config', 'quantization', 'quantize_config', 'compression_config')
_LAYER_KINDS = ('full_attention', 'sliding_attention')


class Fields:
  """The fields of one config.json.

  A family reads every key that it supports; `done` then raises InputError for keys that were not read. The methods raise
  InputError for a value of the wrong type or range.
  """

  def __init__(self, config: dict, neutral: str = ''):
    """neutral: further keys that do not change the logits, separated by spaces."""
    self.config, self._read = config, NEUTRAL | set(neutral.split())
    for key in _QUANTISED:
      if (how := self._get(key, None)) is not None:
        method = how.get('quant_method') if isinstance(how, dict) else None
        by = f' with quant_method {shown(method, 40)}' if method else ''
        raise InputError(f'config.json: {key} marks the checkpoint as quantised{by}; use the unquantised one.')

  def _get(self, key: str, default):
    self._read |= {key}
    value = self.config.get(key)
    return default if value is None else value

  def size(self, key: str, default=None) -> int:
    """A whole number above 0."""
    value = self._get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise InputError(f'config.json: {key}={shown(value)} must be a whole number above 0; correct the file.')
    return value

  def whole(self, key: str, default=None) -> int:
    """A whole number of at least 0."""
    value = self._get(key, default)
    return 0 if type(value) is int and value == 0 else self.size(key, default)

  def any(self, key: str):
    """A value of any type, which the family checks or ignores."""
    return self._get(key, None)

  def number(self, key: str, default=None, optional: bool = False) -> float | None:
    """A number above 0; with `optional`, None if it is absent or null."""
    value = self._get(key, default)
    return None if optional and value is None else rope.above_0(key, value)

  def flag(self, key: str, default: bool = False) -> bool:
    """True or false."""
    value = self._get(key, default)
    if not isinstance(value, bool):
      raise InputError(f'config.json: {key}={shown(value)} must be true or false; correct the file.')
    return value

  def choice(self, key: str, known: dict, default: str):
    """The entry of `known` for the value of a key."""
    value = self._get(key, default)
    if not isinstance(value, str) or value not in known:
      raise InputError(
        f'config.json: {key}={shown(value)} is not supported (only {", ".join(map(repr, known))}); use another checkpoint.'
      )
    return known[value]

  def activation(self, key: str, default: str) -> str:
    """A name in model.layers.ACTIVATIONS."""
    return self.choice(key, ACTIVATIONS, default)

  def only(self, key: str, supported):
    """Requires a key to be absent, null, or the only value that is supported."""
    value = self._get(key, supported)
    # The type counts too: 1 is not True.
    if not (value == supported and type(value) is type(supported)):
      raise InputError(
        f'config.json: {key}={shown(value)} is not supported (only {supported!r} is); use another checkpoint.'
      )

  def window(self, key: str, used: bool = True) -> int:
    """Tokens in the sliding window; 0 if there is none, or `used` is false."""
    return self.size(key) if self._get(key, None) is not None and used else 0

  @staticmethod
  def per_layer(num_layers: int, value: int) -> tuple[int, ...]:
    """The value for each layer; empty for 0, which is the default of Spec."""
    return (value,) * min(num_layers, MOST_LAYERS) if value else ()

  def layer_kinds(self, default, known=_LAYER_KINDS) -> list[str]:
    """layer_types, with one of `known` for each layer; default(l) for layer l if it is absent."""
    L = self.size('num_hidden_layers')
    kinds = self._get('layer_types', None)
    if kinds is None:
      return [default(l) for l in range(min(L, MOST_LAYERS))]
    if not isinstance(kinds, list) or len(kinds) != L or any(k not in known for k in kinds):
      raise InputError(
        f'config.json: layer_types must have {" or ".join(known)} for each of the {L} layers; correct the file.'
      )
    return kinds

  def one_kind(self, window: int):
    """For families whose layers are all alike: if layer_types is given, it must agree."""
    alike = 'sliding_attention' if window else 'full_attention'
    if set(self.layer_kinds(lambda l: alike)) != {alike}:
      raise InputError(f'config.json: layer_types may only have {alike!r} in this family; use another checkpoint.')

  def experts(self, default: int, per_token: int) -> dict:
    """The numbers of experts, as arguments of Spec. Settings of the router's auxiliary loss are ignored.

    Args:
      default: the family's default number of experts.
      per_token: the family's default number of experts per token.
    """
    self._read |= {'output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise'}
    E, k = (
      self.size('num_local_experts', self._get('num_experts', default)),
      self.size('num_experts_per_tok', per_token),
    )
    if not k <= E <= MOST_LAYERS or self._get('num_experts', E) != E:
      raise InputError(
        f'config.json: num_experts_per_tok={k} and the numbers of experts ({E}) contradict each other; correct the file.'
      )
    return dict(experts=E, experts_per_token=k)

  def heads(self, heads='num_attention_heads', kv_heads='num_key_value_heads', width='hidden_size') -> dict:
    """The sizes of attention, as arguments of Spec; `heads`, `kv_heads` and `width` are the names of the keys."""
    d_model, N = self.size(width), self.size(heads)
    H = self.size('head_dim', max(1, d_model // N))
    K = self.size(kv_heads, N) if kv_heads else N
    if H > 2**16:  # before a table of that size is built
      raise InputError(f'config.json: head_dim={H} is larger than in any model; correct the file.')
    if N % K:
      raise InputError(f'config.json: {heads}={N} is not a multiple of {kv_heads}={K}; correct the file.')
    if self.config.get('head_dim') is None and d_model != N * H:
      raise InputError(f'config.json: {width}={d_model} is not a multiple of {heads}={N}; correct the file.')
    return dict(d_model=d_model, num_heads=N, num_kv_heads=K, head_dim=H)

  def rope(self, head_dim: int, theta: float = 10000.0, part: float = 1.0, keys=('rope_theta', None), kinds=None):
    """The rope.Rope of rope_theta and rope_scaling, or of rope_parameters, which transformers 5 writes.

    Args:
      theta: the family's default base.
      part: the family's default for the part of a head that is rotated.
      keys: the names of both outside rope_parameters; None: there is no such key.
      kinds: the kind of layer, if rope_parameters has an entry for each kind.
    """
    tables = {}
    for key in ('rope_scaling', 'rope_parameters'):
      table = self._get(key, {})
      if not isinstance(table, dict):
        raise InputError(f'config.json: {key}={shown(table)} must be an object or null; correct the file.')
      if kinds and table.keys() & set(_LAYER_KINDS):
        if unknown := sorted(set(table) - set(_LAYER_KINDS)):
          raise InputError(f'config.json: {key} has the unknown kind of layer {shown(unknown[0])}; correct the file.')
        table = table.get(kinds) or {}
        if not isinstance(table, dict):
          raise InputError(f'config.json: {key}={shown(table)} must be an object or null; correct the file.')
      elif kinds == 'sliding_attention':
        table = {}  # a single table applies to the layers without a window
      tables |= table
    outside = [self._get(key, None) if key else None for key in keys]
    theta = rope.above_0(keys[0], tables.pop('rope_theta', None) or outside[0] or theta)
    part = rope.above_0(
      keys[1] or 'partial_rotary_factor', tables.pop('partial_rotary_factor', None) or outside[1] or part
    )
    rotated = int(head_dim * part)
    if part > 1 or rotated % 2:
      raise InputError(
        f'config.json: head_dim={head_dim} is odd, but rotary position embedding needs an even one; correct the file.'
        if rotated == head_dim
        else f'config.json: {rotated} of head_dim={head_dim} cannot be rotated, which needs an even part; correct the file.'
      )
    return rope.table(rotated, theta, tables, self.config)

  def done(self, family: str, depth: str = 'num_hidden_layers') -> int:
    """The number of layers.

    Args:
      family: the model_type, for errors.
      depth: the key of the number of layers.

    Raises:
      InputError: a key was not read, or a feature in OFF is on.
    """
    num_layers = self.size(depth)
    unknown = []
    for key, value in self.config.items():
      if key in OFF and key not in self._read:
        self.only(key, OFF[key])
      elif key not in self._read and value is not None:
        unknown.append(shown(key, 40))
    if unknown:
      names = ', '.join(unknown[:10]) + (f' and {len(unknown) - 10} more' if len(unknown) > 10 else '')
      raise InputError(
        f'config.json: {"the keys" if unknown[1:] else "the key"} {names} {"are" if unknown[1:] else "is"} not known for '
        f'model_type {family}; delete what does not change the computation.'
      )
    return num_layers


MOST_LAYERS = 10_000  # limits tables that are built before config.json is compared with the tensors
