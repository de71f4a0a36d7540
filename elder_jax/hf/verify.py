"""Checks an exported folder: it is read back in JAX and, if installed, in PyTorch, and compared with the pruned model."""

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

# Largest accepted difference of a logit in float32, per unit of the logits' standard deviation. PyTorch's float32 and
# float64 differ by 1e-5 at 30 layers; a wrong weight makes a difference of at least 1e-2.
TOLERANCE = 1e-4


class ExportMismatch(RuntimeError):
  """The exported folder does not hold the pruned model."""


def has_torch() -> bool:
  """Whether PyTorch is installed."""
  return importlib.util.find_spec('torch') is not None


def torch_bytes(num_params: int) -> int:
  """Bytes of host memory that the check in PyTorch takes: the model in float32."""
  return 4 * num_params


def use_torch(wish: str, num_params: int, say: Callable[[str], None] = log) -> bool:
  """Whether to load a model in PyTorch.

  Args:
    wish: the value of --verify. auto: only if torch is installed and the model takes at most half of the host's memory.
    say: receives a line if auto leaves the check out.

  Raises:
    InputError: --verify=torch without torch.
  """
  if wish == 'torch' and not has_torch():
    raise InputError('verify', 'torch', 'torch is not installed; install it or use --verify=auto.')
  if wish != 'auto' or not has_torch():
    return wish == 'torch'
  size, total = torch_bytes(num_params), memory.total()
  if size <= total / 2:
    return True
  say(
    f'the check in PyTorch is left out: the model takes {size / 1e9:.0f} GB in float32, this machine has '
    f'{total / 1e9:.0f} GB; force the check with --verify=torch'
  )
  return False


def check_copy(folder: pathlib.Path, expected: Spec, num_layers: int, tokens_BT: np.ndarray, torch: bool) -> dict:
  """Checks an export whose layers were copied from file to file: config.json, and every name and shape.

  Args:
    expected: the spec of the pruned model.
    torch: also load it in PyTorch, and generate with and without a cache.

  Returns:
    {'tensors': their number}, and the figures of `check` in PyTorch.

  Raises:
    ExportMismatch.
  """
  source = open_source(str(folder), folder)
  if source.spec != expected or source.num_layers != num_layers:
    raise ExportMismatch(f'{folder}: config.json describes {source.spec}, the pruned model is {expected}')
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
  """Compares the folder's logits, computed in float32, with those of the model, its weights rounded to `dtype`.

  Args:
    tokens_BT: real text; T ≤ 512 keeps it quick.
    torch: also load it in PyTorch, and generate with and without a cache.
    shardings: as in load_model.
    free: called with each array of the model once it is no longer needed. With memory.free, only one model is in memory
      at a time. None: the model stays.

  Returns:
    {'jax': largest difference of a logit, 'torch': the same, 'generated': token ids}; 'torch_error' replaces the last
    two if PyTorch fails.

  Raises:
    ExportMismatch: a difference exceeds TOLERANCE, or PyTorch generates other tokens with a cache.
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
    raise ExportMismatch(f"{folder}: its logits differ from the pruned model's by up to {result['jax']:.2g}")
  if torch:
    result |= _check_torch(folder, expected, tokens_BT, tolerance)
  return result


def program(model: Decoder, dtype: str, num_tokens: int):
  """(jitted function, arguments) of the heaviest step of `check`, for an abstract model; for the plan."""

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
  """Compares the logits of the loaded model with those of the same files in PyTorch. All processes must call it.

  Args:
    dtype: the type that the model was loaded in; PyTorch's weights are rounded to it. Both sides compute in float32.
    torch: this process runs PyTorch.

  Returns:
    {'torch': largest difference of a logit}, or {'torch_error': why PyTorch failed}.

  Raises:
    InputError: the logits differ, so one side misreads the checkpoint.
  """
  with jax.default_matmul_precision('highest'):
    ours_BTV = hosts.to_host(_logits(model, tokens_BT))
  if not torch:
    return {}
  try:
    theirs_BTV = _torch_logits(_torch_model(source.files, dtype), tokens_BT)
  except Exception as e:  # transformers may raise anything; it proves nothing about the checkpoint  # noqa: BLE001
    return {'torch_error': reason(e)}
  difference = float(np.max(np.abs(ours_BTV - theirs_BTV)))
  if not difference <= TOLERANCE * max(1.0, float(theirs_BTV.std())):
    raise InputError(
      'model',
      source.name,
      f'JAX and PyTorch read this checkpoint differently (logits differ by {difference:.2g}, their '
      f'standard deviation is {theirs_BTV.std():.2g}); please report it, or skip this check with --verify=jax.',
    )
  return {'torch': difference}


def why_torch_cannot(config: dict) -> str:
  """Why transformers cannot build a model from this config.json; empty if it can. Takes no memory for weights."""
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
  """The auto class of transformers for this config.json."""
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
  """Runs the checks in PyTorch.

  Args:
    expected_BTV: the pruned model's logits. None: only generation with and without a cache is compared.

  Returns:
    The figures, or {'torch_error': why} if PyTorch or transformers fails.

  Raises:
    ExportMismatch.
  """
  try:
    return _figures_in_torch(folder, expected_BTV, tokens_BT, tolerance)
  except ExportMismatch:
    raise
  except Exception as e:  # of any kind: the export is complete, only this check failed  # noqa: BLE001
    return {'torch_error': reason(e)}


def _figures_in_torch(folder: pathlib.Path, expected_BTV, tokens_BT, tolerance: float) -> dict:
  import torch
  import transformers

  model, figures = _torch_model(folder), {}
  if expected_BTV is not None:
    figures['torch'] = float(np.max(np.abs(_torch_logits(model, tokens_BT) - expected_BTV)))
    if not figures['torch'] <= tolerance:
      raise ExportMismatch(
        f"{folder}: its logits in PyTorch differ from the pruned model's by up to {figures['torch']:.2g}"
      )
  # This checks weights, not sampling: of generation_config.json, only the special tokens are used.
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
    raise ExportMismatch(f'{folder}: PyTorch generates {cached} with a cache and {uncached} without one')
  return figures | {'generated': cached}
