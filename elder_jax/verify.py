"""Does an exported folder hold the pruned model? Read back in JAX and, where it is installed, in PyTorch."""

import importlib.util
import pathlib

import jax
import numpy as np

from elder_jax import checkpoint_hf
from elder_jax import model as model_lib

# Largest difference of a logit, both sides in float32, per unit of the logits' standard deviation: PyTorch is as far from
# its own float64 (1e-5 at 30 layers); a wrong weight is seen at 1e-2 and more.
TOLERANCE = 1e-4


class ExportMismatch(RuntimeError):
  """The exported folder does not compute what the pruned model computes."""


def has_torch() -> bool:
  return importlib.util.find_spec('torch') is not None


def check(folder: pathlib.Path, model: model_lib.Decoder, dtype: str, tokens_BT: np.ndarray, torch: bool) -> dict:
  """Compares the folder's logits, computed in float32, with the model's (its weights rounded to `dtype`).

  Args:
    tokens_BT: real text; T at most 512 keeps it quick.
    torch: also load it by transformers' AutoModelForCausalLM, and generate with and without a cache.

  Returns:
    {'jax': largest difference of a logit, 'torch': the same, 'generated': token ids}.

  Raises:
    ExportMismatch.
  """
  source = checkpoint_hf.open_source(str(folder), folder)
  read = checkpoint_hf.load(source, dtype)
  with jax.default_matmul_precision('highest'):
    expected = np.asarray(_logits(jax.tree.map(lambda a: a.astype(dtype), model), tokens_BT))
    got = np.asarray(_logits(read, tokens_BT))
  result = {'jax': float(np.max(np.abs(got - expected)))}
  tolerance = TOLERANCE * max(1.0, float(expected.std()))
  if not result['jax'] <= tolerance:
    raise ExportMismatch(f'{folder}: the logits read back differ by {result["jax"]:.2g} from the pruned model')
  if torch:
    result |= _check_torch(folder, expected, tokens_BT, tolerance)
  return result


@jax.jit
def _logits(model, tokens_BT):
  x_BTD, _ = model_lib.forward(model, tokens_BT)
  return model_lib.logits(model, x_BTD)


def _check_torch(folder: pathlib.Path, expected_BTV: np.ndarray, tokens_BT: np.ndarray, tolerance: float) -> dict:
  import torch  # not a requirement of the package
  import transformers

  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokens = torch.tensor(np.asarray(tokens_BT, np.int64))
  with torch.no_grad():
    difference = float(np.max(np.abs(model(tokens).logits.numpy() - expected_BTV)))
    if not difference <= tolerance:
      raise ExportMismatch(f'{folder}: logits in PyTorch differ by {difference:.2g} from the pruned model')
    prompt = tokens[:1, : min(16, tokens.shape[1])]
    generate = lambda cache: model.generate(
      prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, use_cache=cache
    )[0].tolist()
    cached, uncached = generate(True), generate(False)
  if cached != uncached:
    raise ExportMismatch(f'{folder}: PyTorch generates {cached} with a cache and {uncached} without')
  return {'torch': difference, 'generated': cached}
