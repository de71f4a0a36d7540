"""Is the cut model what is left of the original? Both are made by transformers on its device without memory and compared.

What a config.json says of layers is spread over keys of every kind. Whatever they are, layer j of the cut model has to be
what layer kept[j] of the original is: the same modules with the same parameters and settings.
"""

import re
from typing import Any

from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.hf.by_name.keys import quiet_transformers
from elder_jax.hf.by_name.keys import transformers_config
from elder_jax.hf.by_name.keys import transformers_has
from elder_jax.hf.by_name.layer_list import OTHER
from elder_jax.hf.by_name.layer_list import LayerList

# Settings of a module that are its own number.
_NUMBER = re.compile(r'^_?(layer|block)?_?(idx|id|index|number|num)$')
_PLAIN = (bool, int, float, str, type(None))


def why_unchecked(config: dict) -> str:
  """Why transformers cannot be asked; empty where it can."""
  if not transformers_has(config):
    return f'transformers does not know model_type {config.get("model_type")!r}'
  try:
    import torch  # noqa: F401  (not a requirement of the package)
  except ImportError as e:
    return f'torch is not installed ({reason(e)})'
  return ''


def check(config: dict, cut: dict, layers: LayerList, kept: list[int], model: str):
  """Raises InputError where the cut config.json makes another model than the original without its layers.

  Args:
    config, cut: config.json before and after.
    model: what to call it in an error.
  """
  before, others_before = _described(config, layers, layers.depth, model)
  after, others_after = _described(cut, layers, len(kept), model)
  for new, old in enumerate(kept):
    if before[old] != after[new]:
      raise InputError(
        'model',
        model,
        f'by its config.json layer {old} would become another kind of layer ({_difference(before[old], after[new])}); '
        'these layers cannot be cut.',
      )
  if others_before != others_after:
    raise InputError(
      'model',
      model,
      f'what is outside of the layers depends on their number ({_difference(others_before, others_after)}); it cannot be '
      'cut.',
    )


def _described(config: dict, layers: LayerList, depth: int, model: str) -> tuple[list[dict], dict]:
  """(what each layer is, what everything else is)."""
  import torch

  try:
    with torch.device('meta'), quiet_transformers():
      whole = _class_of(config)._from_config(transformers_config(config))
  except Exception as e:  # of any kind: transformers says what it cannot make of a config.json  # noqa: BLE001
    raise InputError(
      'model', model, f'transformers cannot make a model of {depth} layers by its config.json ({reason(e)}).'
    ) from e
  name, found = _list_in(whole, layers, depth, model)
  inside = f'{name}.'
  tensors = {n: tuple(t.shape) for n, t in [*whole.named_parameters(), *whole.named_buffers()]}
  return [_about(layer) for layer in found], {n: s for n, s in tensors.items() if not n.startswith(inside)}


def _class_of(config: dict) -> Any:
  import transformers

  for name in config.get('architectures') or []:
    if (found := getattr(transformers, str(name), None)) is not None:
      return found
  return transformers.AutoModelForCausalLM


def _list_in(whole, layers: LayerList, depth: int, model: str):
  """(name, modules) of the list whose name ends as in the tensors' names."""
  import torch

  last = layers.prefix.removesuffix('.').rpartition('.')[2]
  other = bool(OTHER.search(layers.prefix))
  lists = [
    (name, module)
    for name, module in whole.named_modules()
    if isinstance(module, torch.nn.ModuleList) and len(module) == depth and bool(OTHER.search(name)) == other
  ]
  named = [(name, module) for name, module in lists if name.split('.')[-1] == last] or lists
  if len(named) != 1:
    raise InputError('model', model, f'transformers has no list of {depth} layers named {last} for it.')
  return named[0]


def _about(layer) -> dict:
  """Everything plain that a layer is made of, by name."""
  found: dict[str, Any] = {}
  for name, module in layer.named_modules():
    found[name] = type(module).__name__
    for key, value in vars(module).items():
      plain = isinstance(value, _PLAIN) or (
        isinstance(value, list | tuple) and all(isinstance(v, _PLAIN) for v in value)
      )
      if plain and not _NUMBER.match(key):
        found[f'{name}.{key}'] = value
  for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
    found[f'{name} shape'] = tuple(tensor.shape)
  return found


def _difference(a: dict, b: dict) -> str:
  """The first thing that two descriptions do not share."""
  name = next(n for n in [*a, *b] if a.get(n, _difference) != b.get(n, _difference))
  told = [str(of_one[name])[:60] if name in of_one else 'nothing' for of_one in (a, b)]
  return f'{name.strip(".")}: {told[0]}, then {told[1]}'
