"""GGUF files. The modules here need the package gguf: import them where such a file is read or written."""

LIKE = 'source'  # a choice of --type: the types of the file that the model was made from
CHOICES = (LIKE, 'f32', 'f16', 'bf16', 'q8_0')  # what export.py writes
