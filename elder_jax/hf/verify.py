"""Does an exported folder hold the pruned model? Read back in JAX and, where it is installed, in PyTorch."""

from collections.abc import Callable
import importlib.util
import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from elder_jax.devices import hosts
from elder_jax.devices import memory
from elder_jax.errors import InputError
from elder_jax.errors import reason
from elder_jax.hf import multimodal
from elder_jax.hf import safetensors_files
from elder_jax.hf.load import load_model
from elder_jax.hf.source import Source
from elder_jax.hf.source import open_source
from elder_jax.log import log
from elder_jax.model.decoder import Decoder
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.model.spec import Spec

# Largest difference of a logit, both sides in float32, per unit of the logits' standard deviation: PyTorch is as far from
# its own float64 (1e-5 at 30 layers); a wrong weight is seen at 1e-2 and more.
TOLERANCE = 1e-4


class ExportMismatch(RuntimeError):
  """The exported folder does not compute what the pruned model computes."""


def has_torch() -> bool:
  return importlib.util.find_spec('torch') is not None


def torch_bytes(num_params: int) -> int:
  """Host memory that the check in PyTorch takes: the model in float32."""
  return 4 * num_params


def use_torch(wish: str, num_params: int, say: Callable[[str], None] = log) -> bool:
  """Whether a model is loaded in PyTorch, by --verify; auto leaves out a model that would fill the memory.

  Raises:
    InputError: --verify=torch without torch.
  """
  if wish == 'torch' and not has_torch():
    raise InputError('verify', 'torch', 'torch is not installed; install it or use --verify=auto.')
  if wish != 'auto' or not has_torch():
    return wish == 'torch'
  size, there = torch_bytes(num_params), memory.total()
  if size <= there / 2:
    return True
  say(
    f'the check in PyTorch is left out: in float32 the model takes {size / 1e9:.0f} GB of {there / 1e9:.0f}; '
    '--verify=torch does it all the same'
  )
  return False


def check_copy(folder: pathlib.Path, expected: Spec, num_layers: int, tokens_BT: np.ndarray, torch: bool) -> dict:
  """As `check`, for layers that were copied from file to file: every name and shape, and config.json as it is read."""
  source = open_source(str(folder), folder)
  if source.spec != expected or source.num_layers != num_layers:
    raise ExportMismatch(f'{folder}: config.json says {source.spec}, the pruned model is {expected}')
  return {'tensors': len(source.shapes)} | (_check_torch(folder, None, tokens_BT, 0.0) if torch else {})


def check(
  folder: pathlib.Path,
  model: Decoder,
  dtype: str,
  tokens_BT: np.ndarray,
  torch: bool,
  shardings=None,
  free: Callable | None = None,
) -> dict:
  """Compares the folder's logits, computed in float32, with the model's (its weights rounded to `dtype`).

  Args:
    tokens_BT: real text; T at most 512 keeps it quick.
    shardings: as in load_model.
    torch: also load it by transformers, and generate with and without a cache.
    free: called with the model's arrays, each as soon as it is not needed any more: memory.free there means that only
      one of the models that are compared is in memory at a time. Unset, `model` is left as it is.

  Returns:
    {'jax': largest difference of a logit, 'torch': the same, 'generated': token ids}; 'torch_error' where PyTorch
    could not make its check.

  Raises:
    ExportMismatch.
  """

  def rounded(path, a):
    if a.dtype == dtype or path[0].name == 'gate_L':
      return a
    new = a.astype(dtype)
    if free:
      jax.block_until_ready(new)
      free(a)
    return new

  source = open_source(str(folder), folder)
  with jax.default_matmul_precision('highest'):
    model = jax.tree_util.tree_map_with_path(rounded, model)
    expected = hosts.to_host(_logits(model, tokens_BT))
    if free:
      free(model)
    del model
    got = hosts.to_host(_logits(load_model(source, dtype, shardings), tokens_BT))
  result = {'jax': float(np.max(np.abs(got - expected)))}
  tolerance = TOLERANCE * max(1.0, float(expected.std()))
  if not result['jax'] <= tolerance:
    raise ExportMismatch(f'{folder}: the logits read back differ by {result["jax"]:.2g} from the pruned model')
  if torch:
    result |= _check_torch(folder, expected, tokens_BT, tolerance)
  return result


def program(model: Decoder, dtype: str, num_tokens: int):
  """(jitted function, its arguments) of `check`'s heaviest step, the model being abstract."""

  def kind(path, a):
    return a.dtype if path[0].name == 'gate_L' else dtype

  def rounded(path, a):
    return jax.ShapeDtypeStruct(a.shape, kind(path, a), sharding=a.sharding)

  return _logits, (jax.tree_util.tree_map_with_path(rounded, model), np.zeros((1, num_tokens), np.int32))


@jax.jit
def _logits(model, tokens_BT):
  x_BTD, _ = forward(model, tokens_BT)
  return logits_of(model, x_BTD)


def check_source(source: Source, model: Decoder, dtype: str, tokens_BT, torch: bool) -> dict:
  """Compares the logits of the loaded model with those of the same files in PyTorch; all processes must call it.

  Args:
    dtype: that the model was loaded in; PyTorch's weights are rounded to it. Both sides compute in float32.
    torch: this process does PyTorch's part.

  Returns:
    {'torch': largest difference of a logit}, or {'torch_error': why PyTorch could not be asked}.

  Raises:
    InputError: they differ, so that the checkpoint is not what it was read as.
  """
  with jax.default_matmul_precision('highest'):
    ours_BTV = hosts.to_host(_logits(model, tokens_BT))
  if not torch:
    return {}
  try:
    theirs_BTV = _torch_logits(_torch_model(source.files, dtype), tokens_BT)
  except Exception as e:  # transformers' own, of any kind: nothing is known of the checkpoint then  # noqa: BLE001
    return {'torch_error': reason(e)}
  difference = float(np.max(np.abs(ours_BTV - theirs_BTV)))
  if not difference <= TOLERANCE * max(1.0, float(theirs_BTV.std())):
    raise InputError(
      'model',
      source.name,
      f'JAX and PyTorch read this checkpoint differently (logits differ by {difference:.2g}, their '
      f'standard deviation is {theirs_BTV.std():.2g}); please report it, or leave this check out by --verify=jax.',
    )
  return {'torch': difference}


def why_torch_cannot(config: dict) -> str:
  """Why transformers cannot make a model of this config.json; empty where it can. No memory is taken for it."""
  try:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
      (pathlib.Path(folder) / 'config.json').write_text(json.dumps(config), encoding='utf-8')
      made = transformers.AutoConfig.from_pretrained(folder)
    with torch.device('meta'):
      torch_class(config).from_config(made)
  except Exception as e:  # of any kind  # noqa: BLE001
    return reason(e)
  return ''


def torch_class(config: dict) -> Any:
  """The class of transformers that makes a model of a config.json."""
  import transformers  # not a requirement of the package

  of_pictures = multimodal.is_multimodal(config)
  return transformers.AutoModelForImageTextToText if of_pictures else transformers.AutoModelForCausalLM


def _torch_model(folder: pathlib.Path, dtype: str = 'float32'):
  import torch

  kind = torch_class(safetensors_files.read_json(folder / 'config.json'))
  model = kind.from_pretrained(folder, dtype=torch.float32).eval()
  if dtype != 'float32':
    for parameter in model.parameters():
      parameter.data = parameter.data.to(getattr(torch, dtype)).float()
  return model


def _torch_logits(model, tokens_BT) -> np.ndarray:
  import torch

  with torch.no_grad():
    return model(torch.tensor(np.asarray(tokens_BT, np.int64))).logits.numpy()


def _check_torch(
  folder: pathlib.Path, expected_BTV: np.ndarray | None, tokens_BT: np.ndarray, tolerance: float
) -> dict:
  """expected_BTV: unset, only what is generated with and without a cache is compared.

  Returns:
    Figures; {'torch_error': why} where PyTorch or transformers fails for another reason than a mismatch.
  """
  try:
    return _figures_in_torch(folder, expected_BTV, tokens_BT, tolerance)
  except ExportMismatch:
    raise
  except Exception as e:  # of any kind: the export is whole, only this check could not be made  # noqa: BLE001
    return {'torch_error': reason(e)}


def _figures_in_torch(folder: pathlib.Path, expected_BTV, tokens_BT, tolerance: float) -> dict:
  import torch
  import transformers

  model, figures = _torch_model(folder), {}
  if expected_BTV is not None:
    figures['torch'] = float(np.max(np.abs(_torch_logits(model, tokens_BT) - expected_BTV)))
    if not figures['torch'] <= tolerance:
      raise ExportMismatch(f'{folder}: logits in PyTorch differ by {figures["torch"]:.2g} from the pruned model')
  # Weights are checked here, not sampling: nothing of the folder's generation_config.json but its special tokens.
  own = model.generation_config
  special = {name: getattr(own, name) for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
  model.generation_config = transformers.GenerationConfig(**special)
  prompt = torch.tensor(np.asarray(tokens_BT, np.int64))[:1, :16]

  def generate(cache: bool) -> list[int]:
    mask = torch.ones_like(prompt)
    tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False, use_cache=cache)
    return tokens[0].tolist()

  with torch.no_grad():
    cached, uncached = generate(True), generate(False)
  if cached != uncached:
    raise ExportMismatch(f'{folder}: PyTorch generates {cached} with a cache and {uncached} without')
  return figures | {'generated': cached}
