"""Settings of the results of a run: measurements and answers, the export, trackers."""

import dataclasses

from elder_jax.errors import InputError
from elder_jax.run.tracking import TRACKERS
from elder_jax.settings import Settings
from elder_jax.settings import setting
from elder_jax.text import answers


@dataclasses.dataclass(frozen=True)
class EvalSettings(Settings):
  """What the models of a run are measured on."""

  eval_data: dict[str, str] = setting(
    {},
    'Text to measure perplexity on, as name=source; repeatable. An empty --eval_data= drops those before it.',
  )
  eval_seq_len: int = setting(2048, 'Tokens per perplexity window. Windows do not overlap.', least=2)
  eval_tokens: int = setting(0, 'Tokens to use from the start of each evaluation text; 0: all.', least=0)
  eval_batch_size: int = setting(4, 'Windows per evaluation step.', least=1, rare=True)
  tasks: tuple[str, ...] = setting(
    (),
    'Tasks of lm-evaluation-harness, as in piqa,arc_easy. quick: lambada_openai, piqa, arc_easy, hellaswag, winogrande, '
    'and gsm8k by generation. These have thousands of questions; see --task_limit.',
  )
  tasks_dir: str = setting(
    '', "Folder of local task files (.yaml). They override the harness's own tasks of the same name.", rare=True
  )
  task_limit: int = setting(0, 'Questions to use from the start of each task; 0: all.', least=0, rare=True)
  prompts: str = setting(
    '',
    'File of prompts that the dense and the exported model answer for the report. One prompt per line, or .jsonl with '
    '"prompt". none: no answers. Unset: five built-in prompts, if --eval_data or --tasks is given.',
  )
  answer_tokens: int = setting(
    40, 'Maximum number of tokens of an answer to --prompts.', least=1, below=2**31, rare=True
  )

  def __post_init__(self):
    super().__post_init__()
    for name, source in self.eval_data.items():
      if not (name and source) or '/' in name:
        raise InputError('eval_data', f'{name}={source}', 'must be name=source, as in --eval_data=news=news.txt.')

  @property
  def asks_prompts(self) -> bool:
    """Whether models answer prompts, if the run reads text."""
    return self.prompts != answers.NONE and bool(self.prompts or self.eval_data or self.tasks)


@dataclasses.dataclass(frozen=True)
class OutputSettings(Settings):
  """The export, and trackers that receive the metrics of training."""

  export_dtype: str = setting(
    '',
    "Type of the exported weights; unset: the model's own, or bfloat16 for a quantised .gguf file.",
    choices=('', 'float32', 'bfloat16', 'float16'),
  )
  export_format: str = setting(
    'hf',
    'hf: a Hugging Face folder. gguf: a file for llama.cpp and Ollama, only if --model is a .gguf file and layers are cut '
    'without any training.',
    choices=('hf', 'gguf'),
    rare=True,
  )
  text_only: bool = setting(False, 'Export only the language model of a model for pictures and text.', rare=True)
  push_to_hub: str = setting(
    '',
    'Private repository on the hub, as USER/NAME, to upload the export to after the run. Needs a token (hf auth login, or '
    'HF_TOKEN). May change when a run resumes; a config.json given by --config does not set it.',
    rare=True,
  )
  shard_gb: float = setting(5.0, 'Maximum size of an exported file, in GB (1e9 bytes).', above=0, rare=True)
  verify: str = setting(
    'auto',
    'How the export is checked: jax, read back in JAX; torch, also in PyTorch, or an error; auto, also in PyTorch if torch '
    'and transformers are installed and memory suffices.',
    choices=('auto', 'jax', 'torch'),
  )
  track: tuple[str, ...] = setting(
    (),
    f'Trackers that also receive the metrics of each step: {", ".join(TRACKERS)}; several with commas. Their files go into '
    'the work folder. May change when a run resumes.',
  )

  def __post_init__(self):
    super().__post_init__()
    if unknown := [name for name in self.track if name not in TRACKERS]:
      raise InputError('track', unknown[0], f'is not known; choose from: {", ".join(TRACKERS)}.')
