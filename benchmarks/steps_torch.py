"""The other side of benchmarks.steps: the same calls by transformers in PyTorch."""

import copy
import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional
import transformers


class _Lora(nn.Module):
  """A linear map W that stays, plus 2·A·B of a low rank (alpha = 2 × rank, as our default)."""

  def __init__(self, base: nn.Linear, rank: int):
    super().__init__()
    self.base = base
    where = dict(device=base.weight.device, dtype=torch.float32)
    self.a = nn.Parameter(torch.randn(base.in_features, rank, **where) * base.in_features**-0.5)
    self.b = nn.Parameter(torch.zeros(rank, base.out_features, **where))

  def forward(self, x):
    return self.base(x) + 2.0 * ((x @ self.a.to(x.dtype)) @ self.b.to(x.dtype))


class Torch:
  """PyTorch's side: `call(case)` returns the loss after the device is done."""

  def __init__(
    self, folder: pathlib.Path, tokens_BT: np.ndarray, dtype: str, remat: str, rank: int, lr: float, compiled: bool
  ):
    self.name = 'torch.compile' if compiled else 'torch'
    self.version = torch.__version__
    self.folder, self.dtype, self.remat = folder, getattr(torch, dtype), remat
    self.rank, self.lr, self.compiled = rank, lr, compiled
    self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    self.tokens_BT = torch.tensor(tokens_BT, dtype=torch.long, device=self.device)
    self.model = self.optimizer = self.teacher = None

  def start(self, case: str):
    """Loads the model anew, as a step changes its weights, and makes ready what the case needs."""
    self.model = self.optimizer = self.teacher = None
    torch._dynamo.reset()
    if self.device.type == 'cuda':
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    trained_whole = case in ('full', 'distilled')
    weights = torch.float32 if trained_whole else self.dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=weights, attn_implementation='sdpa')
    self.model = model.to(self.device).eval().requires_grad_(False)
    if case == 'distilled':
      self.teacher = copy.deepcopy(self.model).to(self.dtype)
    trained = self._trained(case)
    if self.remat == 'full' and trained:
      # Checkpointing is active in training mode alone; these models have no dropout to be changed by it.
      self.model.gradient_checkpointing_enable({'use_reentrant': False})
      self.model.train()
    if trained:
      self.optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0, fused=True)
    self.trained = trained
    self.run = torch.compile(self._loss) if self.compiled else self._loss

  def _trained(self, case: str) -> list[nn.Parameter]:
    layers = self.model.model.layers
    if case == 'forward':
      return []
    if case == 'gates':
      gates = [nn.Parameter(torch.ones((), device=self.device)) for _ in layers]
      for layer, gate in zip(layers, gates):
        layer.register_forward_hook(_gated(gate))
      return gates
    if case == 'lora':
      return [p for layer in layers for p in _attach(layer, self.rank)]
    return list(layers.requires_grad_(True).parameters())

  def _loss(self, tokens_BT):
    logits_BTV = self.model(tokens_BT, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
    if self.teacher is None:
      return loss
    with torch.no_grad():
      taught_BTV = self.teacher(tokens_BT, use_cache=False).logits[:, :-1].float()
    log_p, log_q = functional.log_softmax(taught_BTV, -1), functional.log_softmax(logits_BTV, -1)
    kl = functional.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction='batchmean')
    return 0.5 * loss + 0.5 * kl

  def call(self, case: str) -> float:
    mixed = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
    if case == 'forward':
      with torch.inference_mode(), mixed:
        return float(self.run(self.tokens_BT))
    with mixed:
      loss = self.run(self.tokens_BT)
    loss.backward()
    nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    if self.device.type == 'cuda':
      torch.cuda.synchronize()
    return float(loss.detach())

  def peak_bytes(self, case: str) -> int | None:
    """Of a GPU since the case began; PyTorch reports none on a CPU."""
    del case
    return torch.cuda.max_memory_allocated() if self.device.type == 'cuda' else None


def _gated(gate):
  def hook(module, args, output):
    """x + g·d, d being what the layer adds."""
    del module
    x = args[0]
    h = output[0] if isinstance(output, tuple) else output
    gated = x + gate.to(x.dtype) * (h - x)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated

  return hook


def _attach(layer: nn.Module, rank: int) -> list[nn.Parameter]:
  """Puts a _Lora in place of each linear map of the layer; their factors."""
  found = [(name, child) for name, child in layer.named_modules() if isinstance(child, nn.Linear)]
  factors = []
  for name, base in found:
    parent, _, last = name.rpartition('.')
    lora = _Lora(base, rank)
    setattr(layer.get_submodule(parent), last, lora)
    factors += [lora.a, lora.b]
  return factors
