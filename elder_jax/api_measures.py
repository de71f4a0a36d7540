"""What elder_jax as a library measures of a model, and lets it write. See api.py."""

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
  """exp of the mean token NLL over windows of `seq_len` tokens that do not overlap.

  Args:
    tokens: of the text that are used, from its start; 0: all.

  Raises:
    InputError: the text cannot be read, or is shorter than a window.
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
  """{task: figures} of tasks of lm-evaluation-harness (pip install 'elder_jax[eval]'). Raises InputError.

  Args:
    tasks: names; quick stands for six (zero_shot.SETS).
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
  """What the model writes after a prompt. Raises InputError."""
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
