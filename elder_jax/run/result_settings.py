"""Settings of what comes out of a run: figures and answers, the export, trackers."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.run.tracking import TRACKERS
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text import answers


@dataclasses.dataclass(frozen=True)
class EvalSettings(Settings):
  """What all models of a run are measured on."""

  eval_data: dict[str, str] = setting(
    {},
    'Text to measure perplexity on, name=source; repeatable. An empty one (--eval_data=) drops those given before it.',
  )
  eval_seq_len: int = setting(2048, 'Window of the perplexity, in tokens; windows do not overlap.', least=2)
  eval_tokens: int = setting(0, 'Tokens of each evaluation text that are used, from its start; 0: all.', least=0)
  eval_batch_size: int = setting(4, 'Windows per evaluation step.', least=1, rare=True)
  tasks: tuple[str, ...] = setting(
    (),
    'Tasks of lm-evaluation-harness, as in piqa,arc_easy. quick: lambada_openai, piqa, arc_easy, hellaswag, winogrande, '
    'and gsm8k by generation; these have thousands of questions, see --task_limit.',
  )
  tasks_dir: str = setting(
    '', "Folder of local task files (.yaml), which go before the harness's own of a name.", rare=True
  )
  task_limit: int = setting(0, 'Questions per task, from the start; 0: all.', least=0, rare=True)
  prompts: str = setting(
    '',
    'Prompts that the dense and the exported model answer for the report: a file with one on each line, or .jsonl with '
    '"prompt"; none: no answers. Unset: five of elder_jax, where there is --eval_data or --tasks.',
  )
  answer_tokens: int = setting(
    40, 'Largest number of tokens of an answer to --prompts.', least=1, below=2**31, rare=True
  )

  def __post_init__(self):
    super().__post_init__()
    for name, source in self.eval_data.items():
      if not (name and source) or '/' in name:
        raise InputError('eval_data', f'{name}={source}', 'must be name=source, as in --eval_data=news=news.txt.')

  @property
  def asks_prompts(self) -> bool:
    """Whether models answer prompts, in a run that reads text."""
    return self.prompts != answers.NONE and bool(self.prompts or self.eval_data or self.tasks)


@dataclasses.dataclass(frozen=True)
class OutputSettings(Settings):
  """The exported folder, and where the metrics of training go as well."""

  export_dtype: str = setting(
    '',
    "Type of the exported weights; unset: the model's own, of a quantised .gguf file bfloat16.",
    choices=('', 'float32', 'bfloat16', 'float16'),
  )
  export_format: str = setting(
    'hf',
    'hf: a Hugging Face folder; gguf: a file for llama.cpp and Ollama, of a model that is one and of which layers are only '
    'cut.',
    choices=('hf', 'gguf'),
    rare=True,
  )
  text_only: bool = setting(
    False, 'Of a model for pictures and text export the language model by itself, without the other parts.', rare=True
  )
  push_to_hub: str = setting(
    '',
    'Private repository on the hub, as USER/NAME, to upload the export to after the run. Needs a token (hf auth login, or '
    'HF_TOKEN). May change when a run resumes; a config.json given by --config does not set it.',
    rare=True,
  )
  shard_gb: float = setting(5.0, 'Largest size of an exported file, in GB (1e9 bytes).', above=0, rare=True)
  verify: str = setting(
    'auto',
    'Checks of the exported folder: auto, read back in JAX, and in PyTorch where torch and transformers are installed; '
    'jax: JAX only; torch: both, an error if they are missing.',
    choices=('auto', 'jax', 'torch'),
  )
  track: tuple[str, ...] = setting(
    (),
    f'Where the metrics of each step go as well, of {", ".join(TRACKERS)}; several with commas. Files go into the work '
    'folder. May change when a run resumes.',
  )

  def __post_init__(self):
    super().__post_init__()
    if unknown := [name for name in self.track if name not in TRACKERS]:
      raise InputError('track', unknown[0], f'is not known; choose of: {", ".join(TRACKERS)}.')
