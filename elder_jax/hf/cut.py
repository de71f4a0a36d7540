"""config.json of a model with fewer layers."""


def _rope_for_transformers_4(family, config: dict) -> dict:
  """What version 5 has in rope_parameters alone, where version 4 looks for it; it would take its default unasked."""
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
  """The source's config.json with only what the removal of layers and the type of the weights change."""
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
  if dtype:  # transformers 5 writes `dtype`, 4 `torch_dtype`; both are read by both
    changes['dtype' if 'dtype' in config else 'torch_dtype'] = dtype
  changes |= _rope_for_transformers_4(family, config)
  # None: a rule by which the list was made, which does not hold any more.
  return {key: value for key, value in (config | changes).items() if not (key in changes and value is None)}
