"""config.json of a model with fewer layers, for the families that the decoder supports."""


def _rope_for_transformers_4(family, config: dict) -> dict:
  """Copies rope_parameters to the keys that transformers 4 reads.

  transformers 5 writes rope_parameters alone. Version 4 ignores it and would silently use its defaults.
  """
  rope = config.get('rope_parameters')
  if not isinstance(rope, dict):
    return {}
  theta, part = getattr(family, 'ROPE_KEYS', ('rope_theta', 'partial_rotary_factor'))
  old, full = {}, rope.get('full_attention', rope)
  if 'sliding_attention' in rope and hasattr(family, 'ROPE_LOCAL'):
    old[family.ROPE_LOCAL] = rope['sliding_attention'].get('rope_theta')
  old |= {theta: full.get('rope_theta'), part: full.get('partial_rotary_factor')}
  if full.get('rope_type', 'default') != 'default':
    old['rope_scaling'] = {k: v for k, v in full.items() if k not in ('rope_theta', 'partial_rotary_factor')}
  return {key: value for key, value in old.items() if value is not None and config.get(key) is None}


def pruned_config(family, config: dict, kept: list[int], dtype: str) -> dict:
  """config.json of the pruned model: the source's, changed only where the removal or the type of the weights requires it.

  Args:
    family: module of families/.
    kept: numbers of the remaining layers.
    dtype: type of the weights; empty: unchanged.
  """
  key_of_depth = getattr(family, 'DEPTH', 'num_hidden_layers')
  depth, changes = config[key_of_depth], {}
  if len(kept) < depth:
    changes = {
      key: [value[l] for l in kept]
      for key, value in config.items()
      if isinstance(value, list) and len(value) == depth and key.endswith(('layer_types', '_layers'))
    }
    changes |= family.pruned(config, kept) if hasattr(family, 'pruned') else {}
    changes[key_of_depth] = len(kept)
  if dtype:  # transformers 5 writes `dtype`, 4 writes `torch_dtype`; each reads both
    changes['dtype' if 'dtype' in config else 'torch_dtype'] = dtype
  changes |= _rope_for_transformers_4(family, config)
  # None marks a rule, such as a period, that no longer holds and is now written as a list.
  return {key: value for key, value in (config | changes).items() if not (key in changes and value is None)}
