"""GGUF files. The modules here need the package gguf: import them where such a file is read or written."""

LIKE = 'source'  # a choice of --type: the types of the file that the model was made from
CHOICES = (LIKE, 'f32', 'f16', 'bf16', 'q8_0')  # what export.py writes


def default_pattern(period: int, depth: int) -> list[bool]:
  """llama.cpp's rule: the last layer of each period has no window."""
  return [l % period < period - 1 for l in range(depth)]
