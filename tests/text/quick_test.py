"""--tasks=quick: the harness's six task files, with a few local questions in place of those on the hub."""

import functools
import json
import pathlib

import pytest
from tiny import config_of
from tiny import write_tiny_llama

from elder_jax.commands import evaluate
from elder_jax.errors import InputError
from elder_jax.run import pipeline
from elder_jax.run.tables import main_metric
from elder_jax.text import zero_shot

# The harness and its imports emit many warnings.
pytestmark = pytest.mark.filterwarnings('ignore')

FILES = {
  'lambada_openai': 'lambada/lambada_openai.yaml',
  'piqa': 'piqa/piqa.yaml',
  'arc_easy': 'arc/arc_easy.yaml',
  'hellaswag': 'hellaswag/hellaswag.yaml',
  'winogrande': 'winogrande/default.yaml',
  'gsm8k': 'gsm8k/gsm8k.yaml',
}


def question(task: str, i: int) -> dict:
  return {
    'lambada_openai': {'text': f'She counted {i} sheep, and then {i + 1} more sheep'},
    'piqa': {'goal': f'Cut {i} apples', 'sol1': 'with a knife', 'sol2': 'with a spoon', 'label': i % 2},
    'arc_easy': {
      'question': f'What is {i} + 1?',
      'choices': {'text': [str(i), str(i + 1)], 'label': ['A', 'B']},
      'answerKey': 'B',
    },
    'hellaswag': {
      'ind': i,
      'activity_label': 'Baking',
      'ctx_a': f'A cook breaks {i} eggs.',
      'ctx_b': 'he',
      'endings': ['stirs them.', 'flies away.', 'sings.', 'sleeps.'],
      'label': '0',
    },
    'winogrande': {
      'sentence': f'The {i} cups did not fit into the box because the _ were too large.',
      'option1': 'cups',
      'option2': 'box',
      'answer': '1',
    },
    'gsm8k': {'question': f'What is {i} and one?', 'answer': f'It is {i + 1}.\n#### {i + 1}'},
  }[task]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  import lm_eval.tasks

  folder, theirs = tmp_path_factory.mktemp('quick'), pathlib.Path(lm_eval.tasks.__file__).parent
  for task, file in FILES.items():
    questions = folder / f'{task}.jsonl'
    questions.write_text(''.join(json.dumps(question(task, i)) + '\n' for i in range(6)))
    own = {
      'include': str(theirs / file),
      'task': task,
      'dataset_path': 'json',
      'dataset_name': None,
      'dataset_kwargs': {'data_files': dict.fromkeys(('train', 'validation', 'test'), questions.name)},
    }
    (folder / f'{task}.yaml').write_text(json.dumps(own))  # JSON is YAML
  return folder


@pytest.fixture(autouse=True)
def local_only(monkeypatch):
  """Skips the harness's own thousands of task files, which it reads again each time, for seconds."""
  import lm_eval.tasks

  monkeypatch.setattr(
    lm_eval.tasks, 'TaskManager', functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
  )


@pytest.fixture(scope='module')
def long_context(tmp_path_factory) -> str:
  """A model with room for gsm8k: 256 new tokens after five examples."""
  return str(write_tiny_llama(tmp_path_factory.mktemp('long'), max_position_embeddings=1024))


def test_the_six_tasks_in_a_run_and_in_a_command(settings, folder, long_context, tmp_path):
  limits = dict(tasks='quick', tasks_dir=str(folder), task_limit=2)
  report = pipeline.run(
    config_of(**settings | limits | dict(model=long_context, method='last', recipe='none', compare=(), mesh='1,1,1'))
  )
  dense = report['tasks']['dense']
  assert dense.keys() == FILES.keys()
  assert all(values['n'] == 2 for values in dense.values())
  assert dense['lambada_openai']['perplexity'] > 1 and 0 <= dense['lambada_openai']['acc'] <= 1
  assert {'exact_match,strict-match', 'exact_match,flexible-extract'} <= dense['gsm8k'].keys()
  head = next(l for l in (tmp_path / 'work' / 'report.md').read_text().splitlines() if l.startswith('| model'))
  for task in FILES:
    assert f'| {task} exact_match (strict-match), %' in head if task == 'gsm8k' else f'| {task}, %' in head
  config = json.loads((tmp_path / 'work' / 'config.json').read_text())
  assert config['tasks'] == ['quick']

  given = dict(model=long_context, tasks=('quick', 'piqa'), tasks_dir=str(folder), limit=2, mesh=(1, 1, 1))
  command = evaluate.evaluate_model(evaluate.TaskSettings(**given))['tasks']
  assert command.keys() == FILES.keys()
  for task, values in command.items():
    assert values == pytest.approx(dense[task], rel=1e-3, nan_ok=True), task


def test_a_set_is_expanded_without_duplicates_and_its_name_is_reserved(folder, tmp_path):
  assert zero_shot.expand(['piqa', 'quick', 'mine']) == [
    'piqa',
    'lambada_openai',
    'arc_easy',
    'hellaswag',
    'winogrande',
    'gsm8k',
    'mine',
  ]
  own = json.loads((folder / 'piqa.yaml').read_text())
  (tmp_path / 'quick.yaml').write_text(json.dumps(own | {'task': 'quick'}))
  with pytest.raises(InputError, match='tasks=quick: stands for lambada_openai,piqa,.*rename the task'):
    zero_shot.load_tasks(['quick'], str(tmp_path))
  (tmp_path / 'quick.yaml').unlink()
  with pytest.raises(InputError, match='tasks=lambada_openai: the harness has no such task'):
    zero_shot.load_tasks(['quick'], str(tmp_path))


def test_the_main_metric_of_a_task():
  assert main_metric({'perplexity': 3.0, 'perplexity_stderr': 1.0, 'acc': 0.5, 'n': 2}) == 'acc'
  assert main_metric({'bleu': 1.0, 'exact_match,strict': 0.5, 'exact_match,loose': 0.6}) == 'exact_match,strict'
  assert main_metric({'acc_norm': 0.5, 'bleu': 1.0}) == 'acc_norm' and main_metric({'n': 3}) == ''
