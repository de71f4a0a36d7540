"""The Python API for evaluation and generation: perplexity, zero_shot, generate. See api.py."""

from collections.abc import Sequence
import functools

import jax

from elder_jax.api import Model
from elder_jax.devices import sharding
from elder_jax.text import data
from elder_jax.text import generation
from elder_jax.text import perplexity as perplexity_lib
from elder_jax.text import zero_shot as zero_shot_lib
from elder_jax.text.decoding import Sampling


def perplexity(
  model: Model,
  text: str,
  *,
  seq_len: int = 2048,
  batch_size: int = 4,
  tokens: int = 0,
  text_column: str = 'text',
  bos: str = 'auto',
) -> float:
  """Returns the perplexity of a text: exp of the mean token NLL over non-overlapping windows.

  Args:
    text: A file, a folder or a hub data set.
    seq_len: Tokens per window.
    batch_size: Windows per batch.
    tokens: Number of tokens to use, from the start of the text; 0: all.
    text_column: Column that holds the text, in files with columns.
    bos: Where to put a BOS token: auto, tokenizer, window or none.

  Raises:
    InputError: the text cannot be read or is too short, or an argument is invalid.
  """
  rule, first = data.bos_rule(bos, getattr(model.source.family, 'BOS_FIRST', False), model.tokenizer)
  corpus = data.tokenise('text', text, text_column, model.tokenizer, rule == 'tokenizer')
  windows = perplexity_lib.make_windows(corpus, 'text', seq_len, tokens, rule, first)
  put = functools.partial(sharding.put_batch, mesh=model.mesh)
  with jax.set_mesh(model.mesh):
    return perplexity_lib.perplexity(model.decoder, windows, model.mode, batch_size, put)


def zero_shot(
  model: Model, tasks: Sequence[str], *, tasks_dir: str = '', limit: int = 0, batch_size: int = 16
) -> dict[str, dict[str, float | None]]:
  """Returns {task: {metric: value}} of tasks of lm-evaluation-harness (pip install 'elder_jax[eval]').

  Args:
    tasks: Names of tasks; 'quick' is a set of six (zero_shot.SETS).
    tasks_dir: Folder of task definitions of your own; empty: none.
    limit: Maximum number of questions per task; 0: all.
    batch_size: Sequences per batch.

  Raises:
    InputError: the harness is not installed, or a task is unknown.
  """
  loaded = zero_shot_lib.load_tasks(list(tasks), tasks_dir)
  with jax.set_mesh(model.mesh):
    return zero_shot_lib.run(
      model.decoder,
      model.tokenizer,
      loaded,
      model.mode,
      batch_size,
      zero_shot_lib.context_length(model.source.config, model.tokenizer),
      functools.partial(sharding.put_batch, mesh=model.mesh),
      limit or None,
      generation.eos_ids(model.source),
    )


def generate(
  model: Model, prompt: str, max_new_tokens: int = 64, *, sampling: Sampling = Sampling(), seed: int = 0
) -> str:
  """Continues a prompt, for example generate(small, 'The capital of France is', 8).

  Args:
    prompt: The text to continue; no chat template is applied.
    max_new_tokens: Maximum number of new tokens.
    sampling: For example Sampling(temperature=0.8); the default is greedy decoding.
    seed: Seed of the sampling.

  Returns:
    The new text, without the prompt and without special tokens.

  Raises:
    InputError: the prompt is empty, prompt and new tokens exceed the context length, or an argument is out of range.
  """
  tokens = model.tokenizer(prompt, verbose=False)['input_ids']
  with jax.set_mesh(model.mesh):
    new = generation.generate(
      model.decoder,
      [tokens],
      max_new_tokens,
      eos_ids=generation.eos_ids(model.source),
      sampling=sampling,
      seed=seed,
      mode=model.mode,
      capacity=model.source.context_length,
      put=functools.partial(sharding.put_batch, mesh=model.mesh),
    )
  return model.tokenizer.decode(new[0], skip_special_tokens=True)
