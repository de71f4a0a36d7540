"""Faulty task files, metrics that the harness does not report, and models with scores that are not finite."""

import functools
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest
from refusal import one_sentence

from elder_jax.commands import evaluate
from elder_jax.errors import InputError
from elder_jax.hf.load import load_model
from elder_jax.hf.source import open_source
from elder_jax.text import data
from elder_jax.text import zero_shot

# The harness and its imports emit many warnings.
pytestmark = pytest.mark.filterwarnings('ignore')

BODY = """
dataset_path: json
dataset_kwargs:
  data_files:
    validation: q.jsonl
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{a}}"
metric_list:
  - metric: acc
"""
ROLLING = 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\nmetric_list:\n  - metric: '
GENERATE = 'output_type: generate_until\ngeneration_kwargs:\n  max_gen_toks: 4\n  until: ["."]\n'


def write(folder: pathlib.Path, **tasks: str) -> pathlib.Path:
  folder.mkdir(exist_ok=True)
  rows = [{'q': f'Is {i} odd?', 'a': 'yes' if i % 2 else 'no'} for i in range(6)]
  (folder / 'q.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, content in tasks.items():
    (folder / f'{name}.yaml').write_text(content)
  return folder


@pytest.fixture
def local_only(monkeypatch):
  """Skips the harness's own thousands of task files, which take seconds to read."""
  import lm_eval.tasks

  monkeypatch.setattr(
    lm_eval.tasks, 'TaskManager', functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
  )


@pytest.fixture(scope='module')
def loaded_model(tiny):
  return load_model(open_source(str(tiny), tiny), 'float32'), data.load_tokenizer(str(tiny))


def rolling(metric: str) -> str:
  return BODY[: BODY.index('output_type')] + ROLLING + metric + '\n'


@pytest.mark.parametrize(
  ('name', 'content', 'parts'),
  [
    ('child', 'include: gone.yaml\ntask: child\n' + BODY, ['cannot read', 'child.yaml', 'gone.yaml', 'No such file']),
    ('typo', 'task: typo\n  output_type: [\n' + BODY, ['cannot read', 'typo.yaml', 'mapping values', 'line 2']),
    ('fn', f'task: fn\n{BODY}    aggregation: !function gone.mean\n', ["Cannot import module 'gone'"]),
    ('key', f'task: key\nno_such_key: 1\n{BODY}', ["unexpected keyword argument 'no_such_key'"]),
    ('field', 'task: field\n' + BODY.replace('{{q}}', '{{q.x.y}}'), ["has no attribute 'x'"]),
    ('split', 'task: split\n' + BODY.replace('_split: validation', '_split: other'), ["KeyError: 'other'"]),
  ],
  ids=lambda v: v if isinstance(v, str) and v.isalpha() else '',
)
def test_a_broken_task_file_reports_the_error_of_the_harness(tmp_path, local_only, name, content, parts):
  folder = write(tmp_path / 'tasks', **{name: content})
  with pytest.raises(InputError) as caught:
    zero_shot.load_tasks([name], str(folder))
  one_sentence(caught.value.for_command(), f'--tasks={name}: ', *parts)
  assert 'no such task' not in str(caught.value)


@pytest.mark.slow
def test_a_broken_task_file_is_not_replaced_by_the_harness_s_own(tmp_path):
  folder = write(tmp_path / 'tasks', piqa='include: gone.yaml\ntask: piqa\n' + BODY)
  with pytest.raises(InputError, match=r'tasks=piqa: the harness cannot read .*piqa\.yaml .*gone\.yaml'):
    zero_shot.load_tasks(['piqa'], str(folder))


def test_a_task_file_with_another_name_is_found(tmp_path, local_only):
  folder = write(tmp_path / 'tasks', other='task: "mine"\ninclude: gone.yaml\n' + BODY)
  with pytest.raises(InputError, match=r'tasks=mine: the harness cannot read .*other\.yaml'):
    zero_shot.load_tasks(['mine'], str(folder))
  (folder / 'other.yaml').rename(folder / 'mine.yml')
  with pytest.raises(InputError, match=r'reads \.yaml files only; rename .*mine\.yml'):
    zero_shot.load_tasks(['mine'], str(folder))
  with pytest.raises(InputError, match='no such task'):
    zero_shot.load_tasks(['another'], str(folder))


@pytest.mark.parametrize('name', ['[v1] tasks', 'a*', 'a?', 'a::b'])
def test_a_folder_whose_name_is_a_pattern(tmp_path, local_only, name):
  with pytest.raises(InputError, match='tasks_dir=.*pattern'):
    zero_shot.load_tasks(['odd'], str(write(tmp_path / name, odd='task: odd\n' + BODY)))


@pytest.mark.slow
def test_a_hub_id_is_not_read_from_the_current_folder(tmp_path, monkeypatch):
  """The harness's piqa is baber/piqa on the hub, even if that folder exists here."""
  for constants in ('huggingface_hub.constants', 'datasets.config'):
    monkeypatch.setattr(f'{constants}.HF_HUB_OFFLINE', True)
  (tmp_path / 'baber' / 'piqa').mkdir(parents=True)
  row = {'goal': 'g', 'sol1': 'a', 'sol2': 'b', 'label': 0}
  for split in ('train', 'validation', 'test'):
    (tmp_path / 'baber' / 'piqa' / f'{split}.jsonl').write_text(json.dumps(row) + '\n')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match='tasks=piqa: the questions cannot be loaded'):
    zero_shot.load_tasks(['piqa'])


def test_metrics_that_the_harness_does_not_report(tmp_path, local_only, loaded_model, capsys):
  folder = write(
    tmp_path / 'tasks',
    odd='task: odd\n' + BODY,
    own=f'task: own\n{BODY}    aggregation: !function f.plain\n    higher_is_better: true\n',
    text=f'task: text\n{BODY}    aggregation: !function f.words\n    higher_is_better: true\n',
    roll='task: roll\n' + rolling('word_perplexity'),
  )
  (folder / 'f.py').write_text(
    'import numpy\ndef plain(items):\n  return numpy.float32(sum(items) / len(items))\ndef words(items):\n  return "many"\n'
  )
  names = ['odd', 'own', 'text', 'roll']
  loaded = zero_shot.load_tasks(names, str(folder))
  figures = zero_shot.run(*loaded_model, loaded, max_length=64, limit=100)  # more than there are
  assert figures['odd']['acc'] == pytest.approx(figures['own']['acc']) and figures['odd']['acc_stderr'] > 0
  assert figures['own']['acc_stderr'] is None and figures['text'] == {'acc': None, 'acc_stderr': None, 'n': 6}
  assert figures['roll']['word_perplexity'] > 1 and all(figures[name]['n'] == 6 for name in names)
  one = zero_shot.run(*loaded_model, zero_shot.load_tasks(['odd'], str(folder)), max_length=64, limit=1)['odd']
  assert one['acc'] in (0, 1) and one['acc_stderr'] is None and one['n'] == 1
  assert evaluate.table({'odd': one}).splitlines()[-1] == f'| odd | 1 | {100 * one["acc"]:.2f} |'
  assert 'using default' not in capsys.readouterr().err


def test_a_task_that_fails_on_its_answers(tmp_path, local_only, loaded_model):
  folder = write(tmp_path / 'tasks', bad=f'task: bad\nprocess_results: !function f.bad\n{BODY}')
  (folder / 'f.py').write_text('def bad(doc, results):\n  return {"acc": doc["gone"]}\n')
  loaded = zero_shot.load_tasks(['bad'], str(folder))
  with pytest.raises(InputError) as caught:
    zero_shot.run(*loaded_model, loaded, max_length=64)
  one_sentence(caught.value.for_command(), '--tasks=bad: the harness fails', "KeyError: 'gone'")

  def put(array):
    raise ValueError('a bug of elder_jax')

  with pytest.raises(ValueError, match='a bug of elder_jax'):  # not reported as an error of the task
    zero_shot.run(*loaded_model, loaded, max_length=64, put=put)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('kind', ['choice', 'rolling', 'generation'])
def test_scores_that_are_not_finite_are_refused(tmp_path, local_only, loaded_model, kind, value):
  content = {
    'choice': BODY,
    'rolling': rolling('word_perplexity'),
    'generation': BODY.replace('output_type: multiple_choice\n', GENERATE)
    .replace('doc_to_choice: ["yes", "no"]\n', '')
    .replace('acc', 'exact_match'),
  }[kind]
  loaded = zero_shot.load_tasks([kind], str(write(tmp_path / 'tasks', **{kind: f'task: {kind}\n{content}'})))
  model, tokenizer = loaded_model
  assert zero_shot.run(model, tokenizer, loaded, max_length=64, limit=2)[kind]['n'] == 2
  broken = jax.tree.map(lambda a: a.at[0].set(value) if a.ndim == 1 else a, model)
  assert not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(broken))
  with pytest.raises(InputError) as caught:
    zero_shot.run(broken, tokenizer, loaded, max_length=64, limit=2)
  one_sentence(caught.value.for_command(), 'not finite' if kind == 'generation' else f'{kind}: the model returns')


def test_the_context_of_a_model():
  tokenizer = types.SimpleNamespace(model_max_length=int(1e30))

  def length(**config):
    return zero_shot.context_length(config, tokenizer)

  assert length(n_positions=1024, n_ctx=512) == 1024 and length(max_position_embeddings=256) == 256
  assert length(n_positions=None, n_ctx=512) == 512 and length() == 2048
  tokenizer.model_max_length = 4096
  assert length() == 4096


def test_learned_positions_limit_the_context(loaded_model):
  from elder_jax.text.lm_eval_adapter import JaxLM

  model, tokenizer = loaded_model
  for positions, context in ((0, 2048), (64, 64)):  # 0: no learned positions
    spec = types.SimpleNamespace(most_positions=positions)
    assert JaxLM(types.SimpleNamespace(spec=spec), tokenizer, max_length=2048).max_length == context
