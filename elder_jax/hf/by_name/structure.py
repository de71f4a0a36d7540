"""Checks that layer j of the cut model is layer kept[j] of the original.

transformers builds both models on the meta device, which takes no memory. Their layers must have the same modules,
parameter shapes and settings. This finds mistakes in any key of config.json, whatever its name.
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

# Attributes of a module that hold its own number.
_NUMBER = re.compile(r'^_?(layer|block)?_?(idx|id|index|number|num)$')
_PLAIN = (bool, int, float, str, type(None))


def why_unchecked(config: dict) -> str:
  """Why transformers cannot check this model; empty if it can."""
  if not transformers_has(config):
    return f'transformers does not support model_type {config.get("model_type")!r}'
  try:
    import torch  # noqa: F401  (not a requirement of the package)
  except ImportError as e:
    return f'torch is not installed ({reason(e)})'
  return ''


def check(config: dict, cut: dict, layers: LayerList, kept: list[int], model: str):
  """Compares the models that transformers builds from both config.json.

  Args:
    config, cut: config.json before and after the removal.
    model: the model's name for errors.

  Raises:
    InputError: a remaining layer would change, or something outside the layers would, or transformers cannot build one.
  """
  before, others_before = _described(config, layers, layers.depth, model)
  after, others_after = _described(cut, layers, len(kept), model)
  for new, old in enumerate(kept):
    if before[old] != after[new]:
      raise InputError(
        'model',
        model,
        f'its config.json would make layer {old} another kind of layer ({_difference(before[old], after[new])}); remove '
        'other layers.',
      )
  if others_before != others_after:
    raise InputError(
      'model',
      model,
      f'a tensor outside the layers depends on their number ({_difference(others_before, others_after)}); this model '
      'cannot be cut.',
    )


def _described(config: dict, layers: LayerList, depth: int, model: str) -> tuple[list[dict], dict]:
  """(a description of each layer, {name: shape} of all tensors outside the layers)."""
  import torch

  try:
    with torch.device('meta'), quiet_transformers():
      whole = _class_of(config)._from_config(transformers_config(config))
  except Exception as e:  # transformers raises errors of every kind for a config.json  # noqa: BLE001
    raise InputError(
      'model',
      model,
      f'transformers cannot build a model of {depth} layers from its config.json ({reason(e)}); skip this check with '
      '--verify=jax.',
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
  """(name, modules) of the ModuleList that holds the layers."""
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
    raise InputError(
      'model',
      model,
      f'its transformers class has no single list of {depth} layers named {last}; skip this check with --verify=jax.',
    )
  return named[0]


def _about(layer) -> dict:
  """{name: value} of a layer's classes, plain attributes and tensor shapes."""
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
  """The first entry in which two descriptions differ."""
  name = next(n for n in [*a, *b] if a.get(n, _difference) != b.get(n, _difference))
  values = [str(of_one[name])[:60] if name in of_one else 'absent' for of_one in (a, b)]
  return f'{name.strip(".")}: {values[0]} before, {values[1]} after'
