"""Compares the float32 logits of JAX and PyTorch on real text: python -m benchmarks.logits FOLDER TEXT…

FOLDER is a Hugging Face folder, such as an export. For the first two windows of 512 tokens of each text, prints the
largest and the mean difference between JAX and PyTorch, and the largest between PyTorch's float32 and float64. Needs torch.
"""

import pathlib
import sys

import jax
import numpy as np
import torch
import transformers

from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.text import data


def main(folder: pathlib.Path, texts: list[str]):
  model = load_model(open_source(str(folder), folder), 'float32')
  logits = jax.jit(lambda m, t: logits_of(m, forward(m, t)[0]))

  def load(dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

  single, double = load(torch.float32), load(torch.float64)
  tokenizer = data.load_tokenizer(str(folder))
  for text in texts:
    tokens = tokenizer(pathlib.Path(text).read_text(encoding='utf-8')[:20000])['input_ids']
    for i in range(2):
      tokens_BT = np.array([tokens[512 * i : 512 * (i + 1)]], np.int32)
      with torch.no_grad():
        a, b = (m(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy() for m in (single, double))
      d = np.abs(np.asarray(logits(model, tokens_BT)) - a)
      print(f'{pathlib.Path(text).name} {i}: {d.max():.2e} mean {d.mean():.1e}, PyTorch {np.abs(a - b).max():.2e}')


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), sys.argv[2:])
