"""Compares how elder_jax and transformers read a GGUF file, and generates with two layers removed.

  python -m benchmarks.gguf_against_transformers --model=FILE.gguf --text=FILE.txt --workdir=/tmp/gguf [--remove_layers=…]

Prints:
- the seconds to read the header, for elder_jax and for the gguf package, and whether both read the same;
- how many tensors are bit-equal, and the largest difference of a logit on the first 600 tokens of the text;
- whether the tokens of the text equal those of transformers' tokenizer for the file, which lacks SmolLM2's digit rule;
- the export's greedy continuation of two sentences.

Needs torch and accelerate.
"""

import pathlib
import time

from absl import app
from absl import flags
import gguf
import jax
import numpy as np

from elder_jax.hf.gguf import header
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.model.decoder import forward
from elder_jax.model.decoder import logits_of
from elder_jax.run import pipeline
from elder_jax.run.config import Config
from elder_jax.text import data
from elder_jax.text.generation import generate

_MODEL = flags.DEFINE_string('model', None, 'A .gguf file.', required=True)
_TEXT = flags.DEFINE_string('text', None, 'A text file.', required=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for temporary files and the export.', required=True)
_REMOVE = flags.DEFINE_string('remove_layers', '14,15', 'Layers to remove for the export.')
PROMPTS = ('The history of the city of London', 'Photosynthesis is the process by which')


def logits(model, tokens_BT) -> np.ndarray:
  return np.asarray(jax.jit(lambda m, t: logits_of(m, forward(m, t)[0]))(model, tokens_BT))


def compare_heads(path: pathlib.Path):
  start = time.monotonic()
  fields, tensors = header.read(path)
  ours = time.monotonic() - start
  start = time.monotonic()
  reader = gguf.GGUFReader(path)
  expected = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
  theirs = time.monotonic() - start
  same = fields == expected and len(tensors) == len(reader.tensors)
  for ours_t, theirs_t in zip(tensors, reader.tensors):
    same &= ours_t[:3] == (theirs_t.name, tuple(theirs_t.shape.tolist()), theirs_t.tensor_type)
    same &= np.array_equal(ours_t.data, theirs_t.data)
  print(f'header: {ours:.2f} s, the gguf package {theirs:.2f} s; {"the same" if same else "NOT the same"}', flush=True)


def main(argv):
  del argv
  import torch
  import transformers

  path, work = pathlib.Path(_MODEL.value), pathlib.Path(_WORKDIR.value)
  compare_heads(path)
  source = open_source(str(path), work / 'source')
  how = dict(gguf_file=path.name, dtype=torch.float32)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, **how).eval()
  state = theirs.state_dict()
  equal = sum(np.array_equal(source.read(name), state[name].numpy()) for name in source.shapes)
  print(f'{path.name}: {equal} of {len(source.shapes)} tensors bit-equal to those of transformers')

  text = pathlib.Path(_TEXT.value).read_text(encoding='utf-8')
  ours = data.load_tokenizer(str(source.files))
  tokens = ours(text).input_ids
  same = tokens == transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(text).input_ids
  print(f'{len(tokens)} tokens of {_TEXT.value}: {"the same as" if same else "NOT those of"} transformers')
  tokens_BT = np.array([tokens[:600]], np.int32)
  got = logits(load_model(source, 'float32'), tokens_BT)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy()
  nll = -np.take_along_axis(jax.nn.log_softmax(got[:, :-1]), tokens_BT[:, 1:, None], -1).mean()
  worst = np.abs(got - expected).max()
  print(f'logits: largest difference {worst:.1e}, standard deviation {got.std():.1f}, PPL {np.exp(nll):.2f}')
  del theirs, state

  settings = dict(
    model=str(path),
    workdir=str(work / 'run'),
    recipe='none',
    compare=(),
    remove_layers=[int(l) for l in _REMOVE.value.split(',')],
  )
  report = pipeline.run(Config.of(**settings, verify='torch'))
  export = work / 'run' / 'export'
  again = load_model(open_source(str(export), export), 'float32')
  reloaded = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
  with torch.no_grad():
    expected = reloaded(torch.tensor(tokens_BT.astype(np.int64))).logits.numpy()
  print(
    f'without {report["removed"]}, exported: largest difference {np.abs(logits(again, tokens_BT) - expected).max():.1e}'
  )
  for prompt in PROMPTS:
    print(prompt + ours.decode(generate(again, [ours(prompt).input_ids], 40)[0]))


if __name__ == '__main__':
  app.run(main)
