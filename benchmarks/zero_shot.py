"""Compares our adapter of lm-evaluation-harness with its hf backend on a real model: log-likelihoods and accuracies.

  python -m benchmarks.zero_shot --model=FOLDER --text=FILE --tasks_dir=FOLDER --tasks=piqa

FOLDER is a Hugging Face folder, such as an export. 200 requests of various lengths are cut from FILE. Needs lm_eval, torch
and accelerate.
"""

import json
import types

from absl import app
from absl import flags
from absl import logging
import numpy as np

from elder_jax.devices.about import device_name
from elder_jax.devices.about import package_versions
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.log import Progress
from elder_jax.text import data
from elder_jax.text import zero_shot
from elder_jax.text.generation import eos_ids

_MODEL = flags.DEFINE_string('model', None, 'Hugging Face folder.', required=True)
_TEXT = flags.DEFINE_string('text', None, 'Text to cut the requests from.', required=True)
_TASKS = flags.DEFINE_list('tasks', ['piqa'], 'Tasks to compare accuracies on; empty: none.')
_TASKS_DIR = flags.DEFINE_string('tasks_dir', '', 'Folder of local task files.')
_LIMIT = flags.DEFINE_integer('limit', 0, 'Questions per task; 0: all.')
_REQUESTS = flags.DEFINE_integer('requests', 200, 'Requests to compare.')


def requests(text: str, count: int) -> list:
  """(context, continuation) pairs of 1 to 400 and 1 to 60 words, from random positions in the text."""
  words, random, made = text.split(), np.random.default_rng(0), []
  for _ in range(count):
    context, continuation = (int(np.exp(random.uniform(0, np.log(most)))) for most in (400, 60))
    start = int(random.integers(0, len(words) - context - continuation))
    middle, end = start + context, start + context + continuation
    made.append(types.SimpleNamespace(args=(' '.join(words[start:middle]), ' ' + ' '.join(words[middle:end]))))
  return made


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  from lm_eval import evaluator
  from lm_eval.models.huggingface import HFLM

  from elder_jax.text.lm_eval_adapter import JaxLM

  folder = _MODEL.value
  source = open_source(folder, None)
  model = load_model(source, 'float32')
  tokenizer = data.load_tokenizer(folder)
  length = zero_shot.context_length(source.config, tokenizer)
  ours = JaxLM(model, tokenizer, max_length=length, progress=Progress('requests in JAX'))
  theirs = HFLM(pretrained=folder, device='cpu', dtype='float32', batch_size=16)

  with open(_TEXT.value, encoding='utf-8') as file:
    batch = requests(file.read(), _REQUESTS.value)
  mine, reference = ours.loglikelihood(batch), theirs.loglikelihood(batch)
  tokens = [len(ours.tok_encode(r.args[1])) for r in batch]
  result = {
    'requests': len(batch),
    'largest difference per token': max(abs(a - b) / n for (a, _), (b, _), n in zip(mine, reference, tokens)),
    'greedy flags that differ': sum(a != b for (_, a), (_, b) in zip(mine, reference)),
  }
  print(json.dumps(result), flush=True)
  for task in filter(None, _TASKS.value):

    def load(task=task):
      return zero_shot.load_tasks([task], _TASKS_DIR.value)

    progress = Progress(f'{task} in JAX')
    figures = zero_shot.run(
      model,
      tokenizer,
      load(),
      batch_size=16,
      max_length=length,
      limit=_LIMIT.value or None,
      eos_ids=eos_ids(source),
      progress=progress,
    )[task]
    peer = evaluator.evaluate(theirs, load(), limit=_LIMIT.value or None, log_samples=False)['results'][task]
    peer = {k.removesuffix(',none'): v for k, v in peer.items()}
    accuracies = {k: {'elder_jax': figures[k], 'hf': peer[k]} for k in ('acc', 'acc_norm') if k in figures}
    print(json.dumps({task: accuracies, 'questions': figures['n']}), flush=True)
  print(json.dumps({'device': device_name(), 'versions': package_versions()}))


if __name__ == '__main__':
  app.run(main)
